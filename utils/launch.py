"""What main.sh asks before it starts the processes: are the flags right, and which experiment."""
import os
import sys

from utils import experiment
from utils.args import parse
from utils.errors import UserError, run


def main():
    """Print the experiment's name, or nothing where there is nothing to train. Raises UserError."""
    processes, *flags = sys.argv[1:]
    if not processes.isdigit() or not int(processes):
        raise UserError(f"the first argument is the number of processes, found {processes!r}: "
                        f"bash main.sh 4 --train")
    request = parse(flags)
    if "train" not in request.actions:
        return
    if request.args.device == "auto" and int(processes) > 1 or request.args.device == "cuda":
        import torch
        count = torch.cuda.device_count()
        if int(processes) > count:
            raise UserError(f"{processes} processes asked for, this machine has {count} GPUs; ask "
                            f"for fewer, or give --device cpu")
    if "resume" in request.actions:
        print(experiment.find_experiment(request.args.exp).name)
    elif request.args.exp != "none" and int(os.environ.get("NODE_RANK", 0)):
        print(request.args.exp)
    else:
        print(experiment.new_experiment(request.args.exp).name)


if __name__ == "__main__":
    run(main)
