"""Run the real command line many times in a copy of the repository, with the imports done once.

A server process has imported everything that main.py uses and forks a child for each run. The child
can be killed like any process. `hook` makes it send itself a signal at an exact point, see
_install().
"""
import atexit
import collections
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
FLAGS = ["--backbone", "mobilenetv3_small_050", "--input-size", "64", "--batch-size", "4",
         "--effective-batch", "8", "--epochs", "3", "--device", "cpu", "--workers", "1"]


class Warm:
    """Runs in a copy of the repository (`tree`) with a prepared set of drawn faces (`faces`)."""

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
            [sys.executable, self.tree / "tests/helpers/warm.py"], cwd=self.tree, env=self.env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self._server.kill)
        assert self.run(call="warm:draw", argv=[str(self.faces)]).code == 0
        self.flags = [*FLAGS, "--data-dir", str(self.faces)]

    def _ask(self, **what):
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *argv, call=None, hook=None, env=None):
        """Start `main.py argv`, or the "module:function" `call` with argv; return a Child."""
        handle, log = tempfile.mkstemp(".log", dir=self.tree.parent)
        os.close(handle)
        argv = [str(a) for a in argv]
        return Child(self, self._ask(argv=argv, call=call, hook=hook, env=env or {}, log=log), log)

    def run(self, *argv, **options):
        """Start a run and wait for it; return a Child with `code` and `text`."""
        return self.start(*(options.pop("argv", argv)), **options).wait()

    def ranks(self, world, *argv, **options):
        """Run the same command in `world` ranks of one process group; return the Children."""
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
        """Return the folder of an experiment."""
        return self.tree / "weights" / exp

    def bash(self, *argv, **env):
        """Start `bash main.sh argv` as a new process; return a Popen with text output."""
        return subprocess.Popen(["bash", self.tree / "main.sh", *map(str, argv)], text=True,
                                env={**self.env, **env}, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)


class Child:
    """A run: its `pid`; after wait() its exit `code` (minus the signal) and its output `text`."""

    def __init__(self, warm, pid, log):
        self._warm, self.pid, self._log = warm, pid, pathlib.Path(log)

    def wait(self):
        """Wait until the run has ended; return self."""
        self.code = self._warm._ask(wait=self.pid)
        self.text = self._log.read_text(encoding="utf-8", errors="replace")
        return self


@functools.cache
def warm():
    """Return the Warm that the test session shares."""
    return Warm()


def wait_for(condition, seconds=300):
    """Wait until condition() is true; fail after a time limit in seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not reached within {seconds} s"
        time.sleep(0.01)


def draw(folder):
    """Prepare a small set of drawn faces."""
    from utils.data.generator import DataGenerator
    from utils.data.readers import drawn
    drawn.COUNTS = FACES
    DataGenerator("samples", 64, folder, layout="samples", workers=1).run()


def _install(hook):
    """Make this process send itself a signal at the n-th event of a kind.

    Args:
        hook: "KIND:N[:SIGNAL]", several with commas, or None for no signal. The kinds are "step"
            (before an optimiser step) and "update" (after it, before the average of weights); in a
            save of a .pt file "half" (half of the temporary file is written), "fsync" (all of it is
            written), "replace" (it is synced) and "renamed".
    """
    import torch

    from utils import files
    from utils.deploy import export
    from utils.training.trainer import Trainer

    # The export takes longer than the training and has its own tests.
    export.export_weights = lambda path, flip_test=False: path
    hooks = [f"{text}:KILL".split(":")[:3] for text in hook.split(",")] if hook else []
    calls = collections.Counter()

    def event(kind, before=lambda: None):
        calls[kind] += 1
        for wanted, number, name in hooks:
            if wanted == kind and calls[kind] == int(number):
                before()
                os.kill(os.getpid(), getattr(signal, f"SIG{name}"))

    class Watched:
        """The os module, with events in fsync() and replace()."""

        def __getattr__(self, attribute):
            return getattr(os, attribute)

        def fsync(self, file):
            if os.readlink(f"/proc/self/fd/{file}").endswith(".pt.tmp"):
                event("half", lambda: os.truncate(file, os.fstat(file).st_size // 2))
                event("fsync")
            os.fsync(file)

        def replace(self, old, new):
            if new.suffix == ".pt":
                event("replace")
            os.replace(old, new)
            if new.suffix == ".pt":
                event("renamed")

    files.os = Watched()
    optimise, update = Trainer.train_step, torch.optim.AdamW.step

    def optimise_watched(*arguments):
        event("step")
        return optimise(*arguments)

    def update_watched(*arguments, **options):
        result = update(*arguments, **options)
        event("update")
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
        # At a real exit the objects in the frames of the error are still alive.
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
    """Serve JSON requests from stdin with JSON answers on stdout."""
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
    # nohup, if it has started pytest, makes processes ignore SIGHUP.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    args.SETTINGS["save_minutes"] = args.Setting(machine=True)
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
