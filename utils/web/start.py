"""demo.py --serve: from the command line to a running server."""
from __future__ import annotations

import argparse
import pathlib

from utils.detection.detector import get_detector
from utils.errors import UserError
from utils.machine import return_large_blocks
from utils.pipeline import Pipeline
from utils.predictor import Predictor
from utils.tracking import output_names, sources
from utils.web.address import Address
from utils.web.messages import Refused
from utils.web.models import Models, watch_all


def serve(options: argparse.Namespace, weights: pathlib.Path, tracker_settings: dict) -> None:
    """Serve the page until Ctrl-C.

    Args:
        options: of demo.py.
        weights: the weights file.
        tracker_settings: keyword arguments of Tracker.

    Raises:
        UserError: for mistakes of the user.
    """
    if options.flip_test:
        raise UserError("--flip-test: not with --serve, whose page needs the time")
    try:
        from utils.web import server as web
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise UserError("--serve needs aiohttp; pip install -r requirements-web.txt") from None
    from utils.web.broadcast import Broadcast
    return_large_blocks()
    address = Address.parse(options.serve, options.token)
    if options.output:
        raise UserError("--output: a page takes its place with --serve; --landmarks and --events "
                        "of a --source are written")
    if options.source is None:
        server = web.Server(address, models=_models(options, weights, tracker_settings),
                            viewers=options.viewers)
        web.serve(server)
        print(f"{server.frames} frames")
        return
    broadcast = Broadcast(*_source(options, weights, tracker_settings))
    web.serve(web.Server(address, broadcast=broadcast))
    written = ", ".join(str(path) for path in (options.landmarks, options.events) if path)
    print(f"{broadcast.pipeline.frames} frames, {broadcast.pipeline.faces} faces"
          + (": " if written else "") + written)


def _models(options, weights, tracker_settings):
    for flag in ("landmarks", "events", "alarm", "camera_size", "camera_rate", "aspect"):
        if getattr(options, flag):
            raise UserError(f"--{flag.replace('_', '-')} needs --source beside --serve; the page "
                            f"of a viewer's camera has its own list of events and alarm")
    models = Models(weights, options.detector, options.device, tracker_settings)
    try:
        # Mistakes are reported before anyone opens the page, which has to load the model anyway.
        models.pipeline(models.default)
    except Refused as error:
        raise UserError(str(error)) from None
    return models


def _source(options, weights, tracker_settings):
    kind, what = sources.find_source(options.source)
    if kind in ("image", "folder"):
        raise UserError(f"source {options.source}: --serve shows a camera, a stream or a video; "
                        f"without --source, pictures can be dropped on the page")
    if kind != "camera" and options.camera_size:
        raise UserError("--camera-size needs a camera, which this source is not")
    output_names.check_outputs(kind, what, None, options)
    device = options.device or ("auto" if weights.suffix == ".pt" else "cpu")
    predictor = Predictor(weights, device)
    watch_all(options, predictor.scheme)
    source = sources.open_source(kind, what, options.camera_size, options.camera_rate,
                                 options.aspect)
    try:
        return source, Pipeline(predictor, get_detector(options.detector), options,
                                tracker_settings, draws=False)
    except BaseException:
        source.release()
        raise
