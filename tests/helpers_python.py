"""Code run in one Python process after the other's: importing torch and diffusers costs more than most tests."""

import json
import subprocess
import sys

SERVER = """
import contextlib, io, json, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(json.loads(line), {"__name__": "__main__"})
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=answers, flush=True)
"""


class PythonProcess:
    """A process that runs what it is given, each time with fresh globals; what it has imported stays."""

    def __init__(self, *flags: str, **options):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *flags, "-c", SERVER], **pipes, **options)

    def run(self, code: str) -> str:
        """Runs code and returns what it printed.

        Raises:
            AssertionError: it failed, with its traceback.
        """
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process has ended with {self.process.wait()}"
        printed, error = json.loads(answer)
        assert error is None, error
        return printed

    def close(self) -> None:
        self.process.kill()  # forked data workers may hold its input open
        self.process.wait()
