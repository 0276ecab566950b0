"""Runs the real command line many times in a copy of the repository, paying for imports once.

A warm process has imported all that main.py uses, and forks a child for each run; the child can be
killed like any other. `hook` makes it signal itself at an exact moment: see _install.
"""
import atexit
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FACES = {"train": 48, "test": 8}
# 46 faces remain after validation: five steps of eight faces.
FLAGS = ["--backbone", "mobilenetv3_small_050", "--input-size", "64", "--batch-size", "4", "--effective-batch", "8", "--epochs", "3", "--device", "cpu", "--workers", "1"]


class Warm:
    """A copy of the repository in `tree`, a prepared set of drawn faces in `faces`, and runs."""

    def __init__(self):
        self.tree = pathlib.Path(tempfile.mkdtemp(prefix="pipnet-")) / "tree"
        atexit.register(shutil.rmtree, self.tree.parent, True)
        self.tree.mkdir()
        for name in ("main.py", "main.sh", "demo.py", "args.yaml"):
            shutil.copy(ROOT / name, self.tree)
        for name in ("nets", "utils", "tests", "tools"):
            shutil.copytree(ROOT / name, self.tree / name)
        (self.tree / "weights").mkdir()
        self.faces = self.tree.parent / "faces"
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
                    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
        self._server = subprocess.Popen(
            [sys.executable, self.tree / "tests" / "helpers" / "warm.py"], cwd=self.tree, env=self.env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._server.kill)
        assert self.run(call="warm:draw", argv=[str(self.faces)]).code == 0
        self.flags = [*FLAGS, "--data-dir", str(self.faces)]

    def _ask(self, **what):
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *argv, call=None, hook=None, env=None):
        """Begin `main.py argv`, or "module:function" `call` with argv; returns a Child."""
        log = tempfile.NamedTemporaryFile(dir=self.tree.parent, suffix=".log", delete=False).name
        argv = [str(a) for a in argv]
        return Child(self, self._ask(argv=argv, call=call, hook=hook, env=env or {}, log=log), log)

    def run(self, *argv, **options):
        """Start and wait; a Child whose `code` and `text` are there."""
        return self.start(*(options.pop("argv", argv)), **options).wait()

    def ranks(self, world, *argv, **options):
        """The same run in `world` ranks of one group; a list of Children that have ended."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        argv = options.pop("argv", argv)
        group = [self.start(*argv, **options, env={
            "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            for r in range(world)]
        return [child.wait() for child in group]

    def folder(self, exp):
        """The folder of an experiment."""
        return self.tree / "weights" / exp

    def bash(self, *argv, **env):
        """Begin `bash main.sh argv` for real; a Popen whose output is text."""
        return subprocess.Popen(["bash", self.tree / "main.sh", *map(str, argv)], text=True,
                                env={**self.env, **env}, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)


class Child:
    """A run: its `pid`; after wait() its exit `code` (minus the signal) and its output `text`."""

    def __init__(self, warm, pid, log):
        self._warm, self.pid, self._log = warm, pid, pathlib.Path(log)

    def wait(self):
        """Wait for its end; returns itself."""
        self.code = self._warm._ask(wait=self.pid)
        self.text = self._log.read_text(encoding="utf-8", errors="replace")
        return self


@functools.cache
def warm():
    """The one Warm of a test session."""
    return Warm()


def wait_for(condition, seconds=300):
    """Wait until condition() is true; fails after a while."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def draw(folder):
    """Prepare a small set of drawn faces."""
    from utils.data.generator import DataGenerator
    from utils.data.readers import drawn
    drawn.COUNTS = FACES
    DataGenerator("samples", 64, folder, layout="samples", workers=1).run()


def _install(hook):
    """Send a signal to this process at the n-th moment of a kind; hook: "KIND:N[:SIGNAL]".

    step: before an optimiser step; update: after the optimiser, before the average; half, fsync,
    replace, renamed: in a save of a .pt, with half of the temporary file written, all of it
    written, synced, and renamed.
    """
    import torch

    from utils import files
    from utils.deploy import export
    from utils.training.trainer import Trainer

    # The export takes longer than the whole training, and is tested elsewhere.
    export.export_weights = lambda path, flip_test=False: path
    kind, number, name = f"{hook or 'none:0'}:KILL".split(":")[:3]
    calls = iter(range(1, 10 ** 6))

    def moment(place, before=lambda: None):
        if place == kind and next(calls) == int(number):
            before()
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))

    class Watched:
        """The os module with moments."""

        def __getattr__(self, attribute):
            return getattr(os, attribute)

        def fsync(self, file):
            if os.readlink(f"/proc/self/fd/{file}").endswith(".pt.tmp"):
                moment("half", lambda: os.truncate(file, os.fstat(file).st_size // 2))
                moment("fsync")
            os.fsync(file)

        def replace(self, old, new):
            if new.suffix == ".pt":
                moment("replace")
            os.replace(old, new)
            if new.suffix == ".pt":
                moment("renamed")

    files.os = Watched()
    optimise, update = Trainer.train_step, torch.optim.AdamW.step

    def optimise_watched(*arguments):
        moment("step")
        return optimise(*arguments)

    def update_watched(*arguments, **options):
        result = update(*arguments, **options)
        moment("update")
        return result

    Trainer.train_step, torch.optim.AdamW.step = optimise_watched, update_watched


def _child(job):
    out = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(job["env"])
    import main
    from utils import errors
    code, kept = 1, None
    try:
        if job["call"]:
            module, name = job["call"].split(":")
            getattr(__import__(module), name)(*job["argv"])
        else:
            _install(job["hook"])
            sys.argv = ["main.py", *job["argv"]]
            errors.run(main.main)
        code = 0
    except SystemExit as end:
        # As at a real end, all that the error's frames hold is still there at exit.
        code, kept = end.code or 0, end
    except BaseException as error:
        traceback.print_exc()
        kept = error
    finally:
        atexit._run_exitfuncs()
        del kept
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    """The warm process: JSON requests on stdin, JSON answers on stdout."""
    sys.path[:0] = [os.getcwd(), str(pathlib.Path(__file__).parent.parent)]
    import helpers
    sys.modules["helpers.warm"] = helpers.warm = sys.modules["__main__"]
    import timm.layers  # noqa: F401
    import timm.optim  # noqa: F401
    import timm.scheduler  # noqa: F401
    import timm.utils  # noqa: F401
    import torch

    import main  # noqa: F401
    from utils import args, checkpoint, predictor  # noqa: F401
    from utils.data import generator  # noqa: F401
    from utils.deploy import export, quantize  # noqa: F401
    from utils.evaluation import score  # noqa: F401
    from utils.training import trainer  # noqa: F401
    torch.set_num_threads(1)
    # A closed terminal is heard also where pytest itself was started by nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    args.LEAST["save_minutes"] = 0
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _child(job)
        answers.write(f"{json.dumps(answer)}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
