"""benchmarks.compare: every row with every seed, once each, also after an interruption; its table, plot and refusals."""

import re
import shutil
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import train_vaerepa
from benchmarks import compare
from tests.conftest import ROOT, read_metrics
from vaerepa.options import parse_options

ROWS = {"none": {"alignment": "none"}, "vae+sra": {"alignment": ["vae", "sra"]}}
STEPS = 2


@pytest.fixture
def run_compare(arguments, tmp_path):
    """Runs a comparison of tiny runs over `rows`; returns the output folder."""

    def run(code: int = 0, rows=ROWS, **options):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump({"gradient_accumulation_steps": 1}))
        (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "rows": rows}, sort_keys=False))
        line = ["--rows", str(tmp_path / "rows.yaml"), "--output_dir", str(tmp_path / "out"), "--seeds", "0", "1"]
        tiny = {"max_train_steps": STEPS, "validation_steps": 1, "num_validation_samples": 8} | options
        assert compare.main([*line, "--", *arguments(**tiny)]) == code
        return tmp_path / "out"

    return run


@pytest.fixture
def trained(monkeypatch, one_thread) -> list[str]:
    """Runs the trainer in this process, which spares its imports, and on one core; names of the runs so far."""
    monkeypatch.setattr(train_vaerepa.os, "sched_getaffinity", lambda pid: {0})
    names: list[str] = []

    def run_process(command: list[str]) -> tuple[int, int, bool]:
        line = command[2:]
        names.append(Path(parse_options(line).output_dir).name)
        AcceleratorState._reset_state(True)
        if (
            names.count("none-1") == 1 and names[-1] == "none-1"
        ):  # stopped after a step, by a signal to the trainer alone
            line += ["--max_train_steps", "1"]
        return train_vaerepa.main(line), 2**20 * (1 + len(names)), False

    monkeypatch.setattr(compare, "run_process", run_process)
    return names


def cells_of(table: str) -> dict[str, list[str]]:
    """Lines of Markdown tables by their first cell; of equal ones the last."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {first: cells for first, *cells in lines}


def test_an_interrupted_comparison_goes_on_and_reports_all(run_compare, trained):
    run_compare(code=130)
    assert trained == ["none-0", "vae+sra-0", "none-1"]
    out = run_compare()
    assert trained == ["none-0", "vae+sra-0", "none-1", "none-1", "vae+sra-1"]
    run_compare()
    assert len(trained) == 5

    runs = {name: [read_metrics(out / f"{name}-{seed}", "validation/loss") for seed in (0, 1)] for name in ROWS}
    assert [[line["step"] for line in lines] for of_row in runs.values() for lines in of_row] == [[1, 2]] * 4
    report = (out / "results/comparison.md").read_text()
    assert report.startswith("Seeds 0, 1; ")
    cells = cells_of(report)
    reached = "last value of `none`, reached at step, by seed"
    assert list(cells) == ["row", "---", "none", "vae+sra", "step", "1", "2", reached]
    for index, step in enumerate(("1", "2")):
        none, both = ([lines[index]["validation/loss"] for lines in of_row] for of_row in runs.values())
        differences = ", ".join(f"{b / n - 1:+.2%}" for n, b in zip(none, both, strict=True))
        assert cells[step] == [f"{statistics.mean(none):.4f}", f"{statistics.mean(both):.4f} ({differences})"]

    none, both = cells["none"], cells["vae+sra"]
    assert none[0] == both[0]
    assert none[1] == "0.00 M" != both[1]
    assert float(both[2].removesuffix(" GFLOP")) > float(none[2].removesuffix(" GFLOP"))
    lines = [read_metrics(out / f"none-{seed}", "train/images_per_second") for seed in (0, 1)]
    seconds = [statistics.median(8 / line["train/images_per_second"] for line in of_run) for of_run in lines]
    milliseconds = 1e3 * statistics.median(seconds)
    assert none[3:] == [f"{milliseconds:.1f} ms", "", "4 MiB"]  # of 2 and 5, and half is rounded to even
    assert len(re.findall(r"[+-]\d+\.\d%", both[4])) == 2
    with Image.open(out / "results/comparison.png") as plot:
        assert plot.width > 900
        assert len(plot.convert("RGB").getcolors(2**24)) > 10

    for folder in out.glob("*-?"):  # the results are enough
        shutil.rmtree(folder)
    (out / "results/comparison.md").unlink()
    run_compare()
    assert len(trained) == 5
    assert (out / "results/comparison.md").read_text() == report


def test_what_is_measured_is_read_by_its_name(tmp_path):
    lines = [
        '{"step": 10, "train/loss": 3.0, "train/images_per_second": 40.0}',
        '{"step": 10, "validation/ema_0.9/loss": 2.0, "validation/ema_0.9/loss/t=0.05": 9.0}',
        '{"step": 10, "validation/ema_0.5/loss": 8.0}',
        '{"step": 20, "train/images_per_second": 20.0}',
        '{"step": 20, "evaluation/fid": 55.5, "evaluation/kid": null}',
        '{"step": 30, "train/images_per_second": 80.0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--ema_decay", "0.9", "0.5", "--logging_steps", "10", "--global_batch_size", "4"]
    options = parse_options([*options, "--output_dir", str(tmp_path)])
    run = compare.read_run(options, 7)
    assert run.metrics == {"validation/loss": {10: 2.0}, "evaluation/fid": {20: 55.5}}
    assert run.interval_seconds == {10: 1.0, 20: 2.0, 30: 0.5}
    assert (run.step_seconds, run.peak_memory) == (0.1, 7)
    compare.write_result(tmp_path, options, run)
    assert compare.read_result(tmp_path, options) == run
    assert str(tmp_path) not in (tmp_path / f"{tmp_path.name}.json").read_text()  # a result may be published
    slower = compare.Run({}, {10: 1.0, 20: 4.0, 30: 0.5}, 10, 7)
    minutes = compare.clock_of([run, slower])([0, 10, 15, 20, 30])
    assert minutes == pytest.approx([0, 1 / 60, 2.5 / 60, 4 / 60, 4.5 / 60])


def test_steps_to_equal_quality_are_read_between_measurements():
    fid = {10: 50.0, 20: 30.0, 30: 35.0, 40: 20.0}
    assert [compare.step_of_value(fid, goal) for goal in (60, 50, 40, 30, 29, 19)] == [10, 10, 15, 20, 34, None]


def test_a_process_is_measured_and_reached_by_signals():
    code = "import sys, time; b = bytearray(200 * 2**20); sys.exit(3)"
    exit_code, peak_memory, is_interrupted = compare.run_process([sys.executable, "-c", code])
    assert (exit_code, is_interrupted) == (3, False)
    assert peak_memory > 200 * 2**20
    main_thread = threading.main_thread().ident
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(main_thread, signal.SIGTERM))
    timer.start()
    start = time.monotonic()
    exit_code, _, is_interrupted = compare.run_process([sys.executable, "-c", "import time; time.sleep(60)"])
    assert (exit_code, is_interrupted) == (-signal.SIGTERM, True)
    assert time.monotonic() - start < 50  # it did not sleep to its end
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"a": {}, "b": {"max_train_steps": 3}}, {"max_train_steps": None}, "row `a`: --max_train_steps is missing"),
        ({"a": {"max_train_steps": 2}, "b": {"max_train_steps": 3}}, {"max_train_steps": None}, "3 of 8"),
        ({"a": {}, "b": {"global_batch_size": 16}}, {"global_batch_size": None}, "`a` makes 2 steps of 16 images"),
        ({"a": {}}, {"logging_steps": 2}, "--validation_steps 1 is no multiple of --logging_steps 2"),
        ({"a": {"alignment_blok": 1}}, {}, "did you mean `alignment_block`"),
        ({"../a": {}}, {}, "the row `../a` cannot name a folder"),
        ([], {}, "expected `rows`"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(run_compare, trained, capsys, rows, options, message):
    if "global_batch_size" in options:
        rows = {"a": {"train_batch_size": 16}, "b": {"train_batch_size": 8}}
    run_compare(code=2, rows=rows, **options)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
    assert not trained


def test_finished_runs_of_other_options_are_refused(run_compare, trained, capsys):
    run_compare(rows={"none": {"alignment": "none"}}, code=130)
    assert trained == ["none-0", "none-1"]
    run_compare(code=2, rows={"none": {"alignment": "vae"}})
    assert "none-0.json is of a finished run of another --alignment" in capsys.readouterr().err
    assert trained == ["none-0", "none-1"]


def test_a_failed_run_is_named(run_compare, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_process", lambda command: (1, 0, False))
    run_compare(code=1)
    assert "none-0 has failed (exit code 1)" in capsys.readouterr().err


SHIPPED = ["compare_digits.yaml", "clothing128/rows.yaml", "clothing128/convergence.yaml", "imagenet256/ablations.yaml"]
SHIPPED += [f"tiny_imagenet64/{name}.yaml" for name in ("rows", "ablations", "gpu")]


@pytest.mark.parametrize("path", SHIPPED)
def test_the_shipped_rows_can_be_compared(path, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vaerepa.evaluation.evaluator.check_installed", lambda: None
    )  # the test command installs none of it
    rows = compare.read_rows(ROOT / "configs" / path)
    options = {}
    for name, values in rows.items():
        values.setdefault("dataset_name", "somebody/latents")
        (tmp_path / "row.yaml").write_text(yaml.safe_dump(values))
        options[name] = parse_options(compare.command_line(tmp_path / "row.yaml", [], 0, tmp_path / name))
    compare.check_rows(options)
    assert len(rows) > 1
