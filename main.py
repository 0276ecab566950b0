"""Train, test and export PIPNet facial landmark models, as args.yaml and the flags say.

One process:            python main.py --train --data samples
Four GPUs:              bash main.sh 4 --train --test --test-onnx
Score and compare:      python main.py --test --test-onnx --exp NAME
Several machines:       see main.sh
"""
import glob
import json
import os
import pathlib
import sys

from utils import experiment, launch, memory
from utils.args import parse, save_args
from utils.errors import UserError
from utils.errors import run as guarded


def set_folder(args):
    """The folder of the prepared set that args mean; drawn faces are made on first use."""
    if args.data == "samples":
        from utils.generator import prepare_samples
        return prepare_samples(args.input_size)
    folder = pathlib.Path(args.data_dir)
    if any(folder.glob("t*.txt")):
        return folder
    beside = {int(path.name.rpartition("-")[2]): path for path in
              folder.parent.glob(f"{glob.escape(folder.name)}-*")
              if path.name.removeprefix(f"{folder.name}-").isdecimal()}
    # Rather reduce larger crops than blow up smaller ones.
    enough = [size for size in beside if size >= args.input_size]
    return beside[min(enough) if enough else max(beside)] if beside else folder


def train(args, resume=False, stop=None):
    """Train an experiment: best.pt, last.pt, best.onnx, results.csv, curves.png, args.yaml.

    resume: go on from last.pt. stop: a launch.Stop, looked at after each step. Returns the
    experiment's folder, or None where it was stopped (saved, to be resumed). Raises UserError.
    """
    from nets.model import gmacs, parameters
    from utils import checkpoint, distributed, gssl

    ranks = distributed.start(args.device)
    say = print if ranks.first else lambda *_: None
    stop = stop or launch.Stop()
    folder = ranks.share(lambda: experiment.find_experiment(args.exp) if resume
                         else experiment.new_experiment(args.exp))
    state = ranks.share(lambda: checkpoint.read(folder / "last.pt")
                        if resume and (folder / "last.pt").exists() else None)
    if state is not None:
        for name, old, new in checkpoint.changed(state.get("args"), args):
            say(f"resume: {name} changed from {old} to {new}")
    rounds = gssl.plan(args)
    if resume and state is None:
        say(f"resume: {folder.name}: nothing is saved yet, it begins anew")
    run = None
    for part in rounds[0 if state is None else state.get("round", 0):]:
        before = None if run is None or part.fresh else run.carried()
        run = None  # The round before goes, with its loader's processes and memory.
        run = _train_round(args, part, part is rounds[-1], folder, ranks, stop, state, before)
        if run is None:
            if not launch.stopped():
                print(f"stopped and saved; go on with: python main.py --resume --exp {folder.name}")
            return None
        state = None
    distributed.stop()
    if ranks.first:
        experiment.plot_curves(folder)
        export(folder / "best.pt")
        deployed = checkpoint.load_model(folder / "best.pt")
        experiment.record({
            "exp": folder.name, "data": args.data if args.data != "none" else set_folder(args).name,
            "scheme": run.model.scheme.name, "backbone": args.backbone, "head": args.head,
            "lr": args.lr, "epochs": part.first + part.epochs, "batch": run.measure[1],
            "parameters": parameters(deployed),
            "gmacs": f"{gmacs(deployed, args.input_size):.2f}"}, folder.parent)
    return folder


def _train_round(whole, part, last, folder, ranks, stop, state, before):
    """Train one gssl.Round (the only one, without --gssl) and return its Run; None: stopped.

    whole: the knobs of all rounds. last: whether no round follows. state: of last.pt, or None.
    before: Run.carried of the round before, for one that goes on from it, or None.
    """
    from utils import dataset
    from utils.landmarks import model_scheme
    args = part.args(whole)
    prepared = ranks.together(dataset.PreparedSet, ranks.share(set_folder, args))
    scheme = model_scheme(args.scheme, prepared.scheme)
    if "train" not in prepared.lists:
        raise UserError(f"{prepared.folder}: has no train.txt; it can only be tested on")
    run = _build_round(whole, args, part, prepared, scheme, folder, ranks, stop, state, before)
    begin, step = (0, 0) if state is None else run.restore(state)
    if state is not None:
        if ranks.first:
            print(f"resume: {folder.name}: {run.title}" + (
                "all epochs are done" if begin == args.epochs else
                f"goes on at epoch {begin + 1}, step {step + 1}"))
    elif part.number:
        run.begun -= ranks.share(experiment.read_epochs, folder)[-1]["seconds"]
        if before is not None:
            run.carry_on(before)
            before.clear()  # The caller holds it, and its memory is not needed again.
        # What this round began from is about to be overwritten, or gone with the process.
        run.save(0, 0)
    del state
    if ranks.first:
        save_args(whole, folder / "args.yaml")
    return run if _train_epochs(run, part, last, prepared, begin, step) else None


def _build_round(whole, args, part, prepared, scheme, folder, ranks, stop, state, before):
    """The Run of _train_round at its beginning, with what it says on the screen."""
    import torch

    from nets.model import parameters
    from utils import checkpoint, dataset, distil, engine, gssl, loss, unlabelled
    from utils.run import Run, optimisation, parallelise

    say = print if ranks.first else lambda *_: None
    torch.manual_seed(args.seed)
    faces, val = prepared.lists["train"], prepared.lists["val"]
    neighbour_face = dataset.neighbour_face(args.mean_face, scheme)
    pretrained = args.pretrained if state is None else "none"
    model = checkpoint.build_model(args, scheme, neighbour_face, pretrained == "timm")
    if pretrained not in ("none", "timm"):
        left_out = ranks.together(checkpoint.load_pretrained, model, pretrained)
        say(f"{pretrained}: loaded" + (f"; fresh: {', '.join(left_out)}" if left_out else ""))
    model.to(ranks.device, memory_format=torch.channels_last)
    criterion = loss.build_loss(model, args.cls, args.reg, args.offset_loss)
    teacher = None if args.teacher == "none" else ranks.together(
        distil.Teacher, args.teacher, scheme, args.teacher_share, ranks.device)
    extra = ranks.together(unlabelled.read, args.unlabelled_dir, prepared) if args.gssl else None
    if part.number:
        labeller = None
        if state is None:
            labeller = checkpoint.build_model(args, scheme, neighbour_face)
            labeller.load_state_dict(checkpoint.weights_of(
                before or ranks.share(checkpoint.read, folder / "best.pt")))
        faces, labelled = gssl.round_faces(folder, part, labeller, faces, extra, prepared, scheme,
                                           args, ranks)
        criterion = gssl.RoundLoss(criterion, part.task, labelled)
        model.head.coarse = part.task in gssl.COARSE
        say(f"round {part.number}, {part.task}: {labelled} faces with labels (repeated ones "
            f"counted) and {len(extra)} with pseudo-labels")

    accumulate = max(1, round(args.effective_batch / (args.batch_size * ranks.world)))
    loader, sampler = engine.make_loader(faces, prepared, scheme, args, ranks, accumulate)
    say(f"{prepared.folder}: {len(faces)} training and {len(val)} validation faces, "
        f"{scheme.name}, {scheme.points} points" + (", drawn by the repository" if prepared.drawn
                                                    else ""))
    say(f"{args.backbone}, {args.head} head, {parameters(model) / 1e6:.2f} M parameters, on "
        f"{ranks.device.type}")
    batch = args.batch_size * ranks.world * accumulate
    say(f"batch: {args.batch_size} a process x {ranks.world} processes x {accumulate} accumulated "
        f"= {batch} a step (asked {args.effective_batch}); "
        f"{sampler.steps} steps an epoch, {sampler.steps * args.epochs} in all")
    if ranks.world > 1 and ranks.device.type != "cuda":
        say("batch norm: statistics per process (synchronised ones need GPUs)")
    dtype = engine.choose_precision(args.precision, ranks.device, model)
    optimizer, scheduler, ema = optimisation(
        model, args, sampler.steps, part.before, part.whole, part.fresh)
    model, parallel = parallelise(model, ranks)
    return Run(args, folder, ranks, model, parallel, ema, optimizer, scheduler,
               torch.amp.GradScaler(ranks.device.type, enabled=dtype is torch.float16), dtype,
               criterion, loader, sampler, engine.Faults(faces, folder, ranks), stop,
               checkpoint.describe(whole, scheme, prepared.crop, neighbour_face), teacher,
               part.number, f"round {part.number} ({part.task}) " if args.gssl else "",
               part.before * sampler.steps)


def _train_epochs(run, part, last, prepared, begin, step):
    """Train from optimiser step `step` of epoch `begin`; whether the round was finished."""
    from utils import engine, evaluation
    ranks, val = run.ranks, prepared.lists["val"]
    for epoch in range(begin, run.args.epochs):
        finished = engine.train_one_epoch(run, epoch, step)
        step = 0
        if finished:
            averaged = run.model if run.ema is None else run.ema.module
            # Batch norm's statistics are per process on CPUs; all must judge the same net.
            ranks.copy_buffers(averaged)
            averaged.eval()
            predicted = evaluation.predict_list(
                evaluation.torch_predict(averaged, ranks.device), val, prepared.margin,
                run.args.input_size, ranks=ranks)
            found, _ = evaluation.errors(predicted, val, run.model.scheme, prepared.scheme)
            nme = 100 * float(found.mean())
            ranks.share(_finish_epoch, run, part, epoch, nme, averaged)
            run.best, run.losses = min(run.best, nme), []
            run.save(epoch + 1, 0)
        over = last and epoch + 1 == run.args.epochs
        if not finished or not over and ranks.total(run.stop.asked)[0]:
            return False
    return True


def _finish_epoch(run, part, epoch, nme, averaged):
    """Keep the best weights and write the epoch's line to results.csv and the screen."""
    from utils import checkpoint
    lr = run.optimizer.param_groups[0]["lr"]
    loss = sum(run.losses) / max(1, len(run.losses))
    if nme < run.best:
        checkpoint.save({**run.description, "weights": averaged.state_dict(),
                         "epoch": part.first + epoch + 1, "val_nme": nme}, run.folder / "best.pt")
    experiment.append_epoch(run.folder, {
        "epoch": part.first + epoch + 1, "lr": lr, "loss": loss, "val_nme": nme,
        "seconds": round(run.seconds, 1), "round": part.number})
    skipped = f", {run.faults.skipped} steps skipped" if run.faults.skipped else ""
    print(f"{run.title}epoch {epoch + 1:>3}/{run.args.epochs}  lr {lr:.2e}  loss {loss:.4f}  "
          f"val NME {nme:.3f}{' *' if nme < run.best else ''}  {run.seconds:.0f} s{skipped}",
          flush=True)


def test(args, actions):
    """Score the test lists with PyTorch, ONNX Runtime or both; print, plot, report."""
    from utils import boxes, checkpoint, dataset, distributed, evaluation
    from utils.detector import get_detector
    from utils.predictor import Predictor

    if args.report != "none" and not pathlib.Path(args.report).parent.is_dir():
        raise UserError(f"--report {args.report}: there is no such folder")
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
        data = args.data if args.data != "none" else prepared.folder.name
        experiment.record_score(path, report, data)
    if args.report != "none":
        pathlib.Path(args.report).write_text(json.dumps(report, indent=2), encoding="utf-8")


def export(path):
    """Write the .onnx beside a .pt; returns its path."""
    from utils import checkpoint
    from utils import export as exporting
    print(f"exporting {path.with_suffix('.onnx')}")
    return exporting.export(checkpoint.load_model(path), path.with_suffix(".onnx"))


def export_int8(path, args):
    """Write the .int8.onnx beside an .onnx; returns its path. Raises UserError."""
    from utils import dataset, evaluation, quantize
    from utils.predictor import Predictor
    prepared, model = dataset.PreparedSet(set_folder(args)), Predictor(path)
    evaluation.fit_scheme(model.scheme, prepared.scheme, str(path))
    if model.crop != prepared.crop:
        print(f"note: the model was trained on crops {model.crop}, the set has {prepared.crop}")
    print(f"exporting {path.with_suffix('.int8.onnx')}")
    return quantize.quantize(path, quantize.training_crops(prepared, model.input_size))


def dump_pseudo(args):
    """Draw the newest pseudo-labels of an experiment, args being the knobs it was trained with."""
    from utils import dataset, gssl, unlabelled
    from utils.landmarks import model_scheme
    folder = experiment.find_experiment(args.exp)
    prepared = dataset.PreparedSet(set_folder(args))
    scheme = model_scheme(args.scheme, prepared.scheme)
    faces = unlabelled.read(args.unlabelled_dir, prepared)
    print(gssl.dump(folder, faces, prepared.margin, scheme, args.dump_pseudo))


def main():
    """Dispatch the command line."""
    if launch.is_over():
        return
    try:
        dispatch(parse())
    except UserError as error:
        if not launch.report(error):
            raise
        sys.exit(0 if launch.leave() else 2)
    launch.leave(0)


def dispatch(request):
    """Do the actions in their natural order; after training only rank 0 goes on."""
    args, actions = request.args, request.actions
    memory.keep_freed()
    try:
        if "train" in actions:
            resume = "resume" in actions or launch.restarts() > 0
            with launch.Stop() as stop:
                folder = train(launch.resumed(request) if resume else args, resume, stop)
            if folder is None or int(os.environ.get("RANK", 0)):
                return
            args.exp = folder.name
        # What is not typed is as the experiment was trained: its set, above all.
        known = launch.resumed(request)
        known.exp = args.exp
        if args.dump_pseudo and "train" not in actions:
            dump_pseudo(known)
        if "export" in actions:
            exported = export(experiment.find_weights(args.exp))
            if "int8" in actions:
                export_int8(exported, known)
        if actions & {"test", "test_onnx"}:
            test(known, actions)
        if "compare" in actions:
            print(experiment.compare(), end="")
    except OSError as error:
        raise launch.disk_mistake(error) from None
    finally:
        if "train" in actions:
            from utils import distributed
            distributed.stop()


if __name__ == "__main__":
    guarded(main)
