"""vaerepa.visualize: principal components, predicted clean images, and the pictures that are written."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from pipeline_vaerepa import VAEREPAPipeline
from vaerepa import objectives, visualize
from vaerepa.families import Size
from vaerepa.families.dit import DiT, new_transformer
from vaerepa.sampling import MARGIN

NAMES = {0: "ash", 1: "birch, white birch", 2: "cedar"}
CELL = visualize.SMALLEST_CELL
WIDTH = CELL + MARGIN  # of a column


@pytest.fixture(scope="module")
def pipeline(vae, tmp_path_factory):
    """A tiny class-conditional flow of three classes, whose blocks and last layer do something."""
    torch.manual_seed(0)
    transformer = new_transformer(Size(4, 32, 2), 2, 4, 8, 3)
    folder = tmp_path_factory.mktemp("pipeline")
    autoencoder, scheduler = AutoencoderKL.from_pretrained(vae), objectives.FlowMatching().scheduler
    pipeline = DiT().build_pipeline(
        DiTPipeline, DiT().to_stock_form(transformer), autoencoder, scheduler, id2label=NAMES
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def plot(pipeline, data, tmp_path):
    """Plots pictures of a tiny model; returns their folder."""

    def run(code: int = 0, **options):
        options = {
            "pretrained_model_name_or_path": pipeline,
            "dataset_name": data,
            "num_images": 3,
            "num_inference_steps": 6,
            "num_shown_steps": 4,
            "output_dir": tmp_path / "pictures",
        } | options
        line = []
        for name, value in options.items():
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        assert visualize.main(line) == code
        return tmp_path / "pictures"

    return run


def test_principal_components_are_those_of_an_svd():
    features = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8) + 3
    array = features.double().numpy()
    left, singular, right = np.linalg.svd(array - array.mean(0), full_matrices=False)
    expected = left[:, :3] * singular[:3]
    expected *= [np.sign(row[np.abs(row).argmax()]) for row in right[:3]]
    components = visualize.principal_components(features)
    np.testing.assert_allclose(components.numpy(), expected, atol=1e-9)
    covariance = np.cov(array.T)
    np.testing.assert_allclose(components.var(0).numpy(), np.linalg.eigvalsh(covariance)[::-1][:3], rtol=1e-9)
    one = visualize.principal_components(features[:, :1])
    torch.testing.assert_close(one[:, 0], features[:, 0].double() - features[:, 0].double().mean())
    assert one.shape == (50, 3)
    assert not one[:, 1:].any()


def test_colours_are_the_components_of_all_pictures_together():
    features = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    pictures = visualize.to_pictures(features)
    tokens = features.permute(0, 2, 3, 1).reshape(-1, 5)
    pixels = np.stack([np.asarray(picture) for picture in pictures]).reshape(-1, 3)
    for place, component in enumerate(visualize.principal_components(tokens).T.numpy()):
        low, high = np.quantile(component, [0.01, 0.99])
        expected = 255 * np.clip((component - low) / (high - low), 0, 1)
        assert np.abs(pixels[:, place] - expected).max() <= 0.51
        assert pixels[:, place].min() == 0
        assert pixels[:, place].max() == 255


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_hidden_states_are_a_blocks_output_without_a_class(pipeline, t):
    stock = DiTPipeline.from_pretrained(pipeline)
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    hook = stock.transformer.transformer_blocks[1].register_forward_hook(lambda m, i, output: outputs.append(output))
    noise = visualize.noise_like(clean, 5)
    with torch.no_grad():
        stock.transformer.eval()(
            (1 - t) * clean + t * noise, timestep=torch.full((2,), 1000.0 * t), class_labels=torch.full((2,), 1000)
        )
    hook.remove()
    states = visualize.hidden_states(DiT(), stock.transformer, stock.scheduler, clean, t, 2, 5)
    assert states.shape == (2, 32, 4, 4)
    torch.testing.assert_close(states.flatten(2).transpose(1, 2), outputs[0])
    assert torch.equal(visualize.noise_like(clean[:1], 5), noise[:1])


def test_the_clean_image_is_predicted_from_the_guided_velocity(pipeline):
    stock = DiTPipeline.from_pretrained(pipeline)
    ours = VAEREPAPipeline(stock.transformer, stock.vae, stock.scheduler, NAMES)
    noise = visualize.noise_like(torch.empty(2, 4, 8, 8), 0)
    predictions = visualize.predicted_clean(ours, [2, 0], noise, 4, 1.5)
    x = noise.double()
    for step, prediction in enumerate(predictions):
        t = 1 - step / 4
        with torch.no_grad():
            velocities = [
                stock.transformer(
                    x.float(), timestep=torch.full((2,), 1000 * t), class_labels=torch.tensor(labels)
                ).sample.double()
                for labels in ([2, 0], [1000, 1000])
            ]
        velocity = velocities[1] + 1.5 * (velocities[0] - velocities[1])
        torch.testing.assert_close(prediction, x - t * velocity, rtol=1e-4, atol=1e-4)
        x = x - velocity / 4
    torch.testing.assert_close(predictions[-1], x, rtol=1e-4, atol=1e-4)


def test_pictures_of_the_right_size_are_written(plot):
    folder = plot(block=[1, 4], t=[0.2, 0.8], class_labels=[2, 0])
    with Image.open(folder / "features.png") as features, Image.open(folder / "trajectories.png") as trajectories:
        columns, rows = 2 + 2 * 2, 3
        assert features.width == columns * WIDTH
        assert features.height % rows == 0
        assert CELL < features.height / rows < CELL + 40  # a picture, and its name below
        assert trajectories.width == (4 + 1) * WIDTH
        assert trajectories.height % 2 == 0
        states = [np.asarray(features.crop((c * WIDTH, 0, c * WIDTH + CELL, CELL))) for c in range(columns)]
        cells = [np.asarray(trajectories.crop((c * WIDTH, 0, c * WIDTH + CELL, CELL))) for c in range(5)]
    assert len({state.tobytes() for state in states}) == columns
    patches = states[2].reshape(4, CELL // 4, 4, CELL // 4, 3)  # 4 x 4 tokens
    assert (patches == patches[:, :1, :, :1]).all()
    assert np.array_equal(cells[3], cells[4])  # the last step goes to its prediction
    assert not np.array_equal(cells[0], cells[4])

    again = plot(block=[1, 4], t=[0.2, 0.8], class_labels=[2, 0], output_dir=folder.parent / "again")
    assert (again / "features.png").read_bytes() == (folder / "features.png").read_bytes()


def test_a_model_that_predicts_noise_has_features_alone(plot, vae, tmp_path, caplog):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(2, 8, in_channels=4, out_channels=8, num_layers=5, sample_size=8, patch_size=2)
    DiTPipeline(transformer, AutoencoderKL.from_pretrained(vae), DDIMScheduler()).save_pretrained(tmp_path / "dit")
    folder = plot(pretrained_model_name_or_path=tmp_path / "dit", t=[0.5])
    with Image.open(folder / "features.png") as features:
        assert features.width == (2 + 3) * WIDTH  # blocks 1, 2 and 3
    assert not (folder / "trajectories.png").exists()
    assert "no trajectories" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 5}, "--block 5: this model has blocks 1 to 4"),
        ({"t": 1.5}, "--t 1.5: expected numbers from 0 (data) to 1 (noise)"),
        ({"num_images": 0}, "--num_images 0: expected above 0"),
        ({"num_shown_steps": 7}, "--num_shown_steps 7: there are 6 steps only"),
        ({"class_labels": [0, 3]}, "--class_labels: expected numbers from 0 to 2"),
        ({"split": "tests"}, "has no split `tests`"),
        ({"pretrained_model_name_or_path": "nowhere"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_plotted_is_refused(plot, capsys, options, message):
    folder = plot(code=2, **options)
    error = capsys.readouterr().err
    assert message in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert not folder.exists()


def test_text_to_image_pipelines_are_refused(plot, capsys, pipelines):
    plot(code=2, pretrained_model_name_or_path=pipelines("sd3"))
    error = capsys.readouterr().err
    assert "expected one of DiTPipeline" in error
    assert "--text_conditioning" not in error  # which visualize does not have
