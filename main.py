"""Train, test and export PIPNet facial landmark models, as args.yaml and the flags say.

One process:            python main.py --train --data samples
Four GPUs:              bash main.sh 4 --train --test --test-onnx
Score and compare:      python main.py --test --test-onnx --exp NAME
Several machines:       see main.sh
"""
import json
import os
import pathlib
import time

from utils.args import parse, save_args
from utils.errors import UserError
from utils.errors import run as guarded


def set_folder(args):
    """The folder of the prepared set that args mean; drawn faces are made on first use."""
    if args.data == "samples":
        from utils.generator import prepare_samples
        return prepare_samples(args.input_size)
    folder = pathlib.Path(args.data_dir)
    beside = folder.with_name(f"{folder.name}-{args.input_size}")
    return beside if beside.is_dir() and not any(folder.glob("t*.txt")) else folder


def train(args, resume=False):
    """Train an experiment: best.pt, last.pt, best.onnx, results.csv, curves.png, args.yaml.

    Returns its folder, or None where a signal stopped it (saved, to be resumed).
    """
    import timm.optim
    import timm.scheduler
    import timm.utils
    import torch

    from nets.model import parameters
    from utils import checkpoint, dataset, distributed, engine, evaluation, experiment, loss
    from utils.landmarks import SCHEMES
    from utils.run import Run

    ranks = distributed.start(args.device)
    say = print if ranks.first else lambda *_: None
    # torchrun starts all ranks again when one has died; they go on from the last save.
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    folder = ranks.share(lambda: experiment.find_experiment(args.exp) if resume
                         else experiment.new_experiment(args.exp))
    torch.manual_seed(args.seed)
    prepared = dataset.PreparedSet(ranks.share(lambda: set_folder(args)))
    scheme = prepared.scheme
    if args.scheme not in ("auto", scheme.name):
        scheme = _model_scheme(args.scheme, scheme)
    if "train" not in prepared.lists:
        raise UserError(f"{prepared.folder}: has no train.txt; it can only be tested on")
    faces, val = prepared.lists["train"], prepared.lists["val"]
    neighbour_face = None
    if args.mean_face == "published":
        if scheme.name not in SCHEMES:
            raise UserError(f"mean_face: published: there is none for {scheme.name}")
        neighbour_face = SCHEMES[scheme.name].mean_face
    elif args.mean_face != "data":
        neighbour_face = dataset.read_mean_face(args.mean_face)
    model = checkpoint.build_model(args, scheme, neighbour_face, args.pretrained == "timm")
    if args.pretrained not in ("none", "timm"):
        left_out = checkpoint.load_pretrained(model, args.pretrained)
        say(f"{args.pretrained}: loaded" + (f"; fresh: {', '.join(left_out)}" if left_out else ""))
    model.to(ranks.device, memory_format=torch.channels_last)

    accumulate = max(1, round(args.effective_batch / (args.batch_size * ranks.world)))
    loader, sampler = engine.make_loader(faces, prepared, scheme, args, ranks, accumulate)
    steps = sampler.steps * args.epochs
    say(f"{prepared.folder}: {len(faces)} training and {len(val)} validation faces, "
        f"{scheme.name}, {scheme.points} points" + (", drawn by the repository" if prepared.drawn
                                                    else ""))
    say(f"{args.backbone}, {args.head} head, {parameters(model) / 1e6:.2f} M parameters, on "
        f"{ranks.device.type}")
    say(f"batch: {args.batch_size} a process x {ranks.world} processes x {accumulate} accumulated = "
        f"{args.batch_size * ranks.world * accumulate} a step (asked {args.effective_batch}); "
        f"{sampler.steps} steps an epoch, {steps} in all")
    dtype = engine.choose_precision(args.precision, ranks.device, model)
    optimizer = torch.optim.AdamW(
        timm.optim.param_groups_weight_decay(model, args.weight_decay), args.lr)
    warmup = min(round(args.warmup_epochs * sampler.steps), steps - 1)
    scheduler = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=args.min_lr, warmup_t=warmup,
        warmup_lr_init=args.lr / 10, t_in_epochs=False)
    scheduler.step_update(0)
    ema = None
    if args.ema:
        # Never below a few steps' memory, nor so long that the random start stays in.
        ema = timm.utils.ModelEmaV3(model, 1 - 1 / max(2.0, args.ema * steps), use_warmup=True)
    parallel = model
    if ranks.world > 1:
        if ranks.device.type == "cuda":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            say("batch norm: statistics per process (synchronised ones need GPUs)")
        parallel = torch.nn.parallel.DistributedDataParallel(
            model, [ranks.device.index] if ranks.device.type == "cuda" else None)
    run = Run(args, folder, ranks, model, parallel, ema, optimizer, scheduler,
              torch.amp.GradScaler(ranks.device.type, enabled=dtype is torch.float16), dtype,
              loss.build_loss(model, args.cls, args.reg, args.offset_loss), loader, sampler,
              engine.Faults(faces, folder), engine.Stop(),
              checkpoint.describe(args, scheme, prepared.crop, neighbour_face))
    epoch, step = (0, 0)
    state = ranks.share(lambda: checkpoint.read(folder / "last.pt")
                        if resume and (folder / "last.pt").exists() else None)
    if state is not None:
        epoch, step = run.restore(state)
        say(f"resume: {folder.name} goes on at epoch {epoch + 1}, step {step + 1}")
    if ranks.first:
        save_args(args, folder / "args.yaml")

    for epoch in range(epoch, args.epochs):
        begun = time.monotonic()
        finished = engine.train_one_epoch(run, epoch, step)
        step = 0
        if finished:
            averaged = model if ema is None else ema.module
            averaged.eval()
            predicted = evaluation.predict_list(evaluation.torch_predict(averaged, ranks.device), val,
                                            prepared.margin, args.input_size, ranks=ranks)
            nme = 100 * float(evaluation.errors(predicted, val, scheme, prepared.scheme)[0].mean())
        run.seconds += time.monotonic() - begun
        if finished:
            total, count = ranks.total(sum(run.losses), len(run.losses))
            if ranks.first:
                _finish_epoch(run, epoch, nme, total / max(count, 1), averaged)
            run.best = min(run.best, nme)
            run.losses = []
            run.save(epoch + 1, 0)
        if not finished or (run.stop.asked and epoch + 1 < args.epochs):
            say(f"stopped and saved; go on with --resume --exp {folder.name}")
            return None
    if ranks.first:
        experiment.plot_curves(folder)
        export(folder / "best.pt")
        experiment.record({
            "exp": folder.name, "data": args.data if args.data != "none" else prepared.folder.name,
            "scheme": scheme.name, "backbone": args.backbone, "head": args.head, "lr": args.lr,
            "epochs": args.epochs, "batch": args.batch_size * ranks.world * accumulate,
            "parameters": parameters(model)}, folder.parent)
    return folder


def _model_scheme(name, set_scheme):
    """The scheme asked for, as a subset of the set's, with the set's own mean face."""
    from utils.landmarks import get_scheme
    asked = get_scheme(name, set_scheme)
    if asked.base != set_scheme.name:
        raise UserError(f"scheme {asked.name} is neither the set's ({set_scheme.name}) nor a part of "
                        f"it")
    return set_scheme.subset(asked.indices, asked.name)


def _finish_epoch(run, epoch, nme, loss, averaged):
    """Keep the best weights and write the epoch's line to results.csv and the screen."""
    from utils import checkpoint, experiment
    lr = run.optimizer.param_groups[0]["lr"]
    if nme < run.best:
        checkpoint.save({**run.description, "weights": averaged.state_dict(), "epoch": epoch + 1,
                         "val_nme": nme}, run.folder / "best.pt")
    experiment.append_epoch(run.folder, {"epoch": epoch + 1, "lr": lr, "loss": loss, "val_nme": nme,
                                         "seconds": round(run.seconds, 1)})
    skipped = f", {run.faults.skipped} steps skipped" if run.faults.skipped else ""
    print(f"epoch {epoch + 1:>3}/{run.args.epochs}  lr {lr:.2e}  loss {loss:.4f}  val NME {nme:.3f}"
          f"{' *' if nme < run.best else ''}  {run.seconds:.0f} s{skipped}", flush=True)


def test(args, actions):
    """Score the test lists with PyTorch, ONNX Runtime or both; print, plot, report."""
    from utils import boxes, checkpoint, dataset, distributed, evaluation, experiment
    from utils.detector import get_detector
    from utils.predictor import Predictor

    prepared = dataset.PreparedSet(set_folder(args))
    if not prepared.tests:
        raise UserError(f"{prepared.folder}: has no test list")
    path = experiment.find_weights(args.exp, ".pt" if "test" in actions else ".onnx")
    ways = {}
    if "test" in actions:
        weights = path.with_suffix(".pt")
        if not weights.is_file():
            raise UserError(f"{weights}: no such file; for an ONNX file alone give --test-onnx")
        if args.boxes == "none":
            device = distributed.choose_device(args.device)
            model = checkpoint.load_model(weights, device)
            ways["pytorch"] = model, evaluation.torch_predict(model, device, args.flip_test)
        else:
            ways["pytorch"] = Predictor(weights, args.device), None
    if "test_onnx" in actions:
        onnx = path.with_suffix(".onnx")
        predictor = Predictor(onnx if onnx.is_file() else export(path), args.device)
        ways["onnx"] = predictor, lambda images: predictor(images.permute(0, 2, 3, 1).numpy())[0]
    report, found = {}, {}
    for way, (model, predict) in ways.items():
        evaluation.fit_scheme(model.scheme, prepared.scheme, str(path))
        if model.crop != prepared.crop:
            print(f"note: the model was trained on crops {model.crop}, the set has {prepared.crop}")
        if args.boxes == "none":
            report[way], found[way] = evaluation.score(predict, model, prepared, args.workers)
        else:
            report[way], found[way] = boxes.score(model, get_detector(args.boxes), prepared)
        evaluation.print_table(way, report[way])
    if len(ways) == 2:
        report["max_abs_diff_px"] = evaluation.largest_difference(*found.values(), prepared)
        print(f"largest difference of a coordinate: {report['max_abs_diff_px']:.4f} px")
    evaluation.draw_errors(next(iter(found.values())), model.scheme, prepared, path)
    if args.boxes == "none":
        experiment.record_score(path, report)
    if args.report != "none":
        pathlib.Path(args.report).write_text(json.dumps(report, indent=2), encoding="utf-8")


def export(path):
    """Write the .onnx beside a .pt; returns its path."""
    from utils import checkpoint
    from utils import export as exporting
    print(f"exporting {path.with_suffix('.onnx')}")
    return exporting.export(checkpoint.load_model(path), path.with_suffix(".onnx"))


def main():
    """Dispatch the command line."""
    request = parse()
    args, actions = request.args, request.actions
    verdict = os.environ.get("PIPNET_VERDICT")
    if verdict and os.path.getsize(verdict):
        # An earlier try under torchrun ended in a user's mistake: trying again changes nothing.
        return
    try:
        dispatch(args, actions)
    except UserError as error:
        if not verdict:
            raise
        pathlib.Path(verdict).write_text(str(error), encoding="utf-8")
        os._exit(2)


def dispatch(args, actions):
    """Do the actions in their natural order; after training only rank 0 goes on."""
    from utils import distributed, experiment
    if "train" in actions:
        try:
            folder = train(args, "resume" in actions)
        finally:
            distributed.stop()
        if folder is None or int(os.environ.get("RANK", 0)):
            return
        args.exp = folder.name
    if "export" in actions:
        export(experiment.find_weights(args.exp))
    if actions & {"test", "test_onnx"}:
        test(args, actions)
    if "compare" in actions:
        print(experiment.compare(), end="")


if __name__ == "__main__":
    guarded(main)
