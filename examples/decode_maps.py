"""Landmarks from the maps of a .raw.onnx (main.py --export --raw); needs numpy alone.

import json, decode_maps
about = json.load(open("weights/fast.raw.json"))
landmarks, confidence = decode_maps.decode(maps, about)
"""
import numpy


def decode(maps, about):
    """Landmarks (K, 2) in crop units (0..1) and confidence (K,) of one face.

    maps: the graph's outputs in their order, (1, C, G, G) or (C, G, G). about: the .raw.json, or
    the ONNX file's metadata with its JSON parsed. As PIPNet section 3.2: the cell with the best
    score gives a landmark's own place and that of its neighbours; what is said of one is averaged.
    """
    maps = [numpy.asarray(m, numpy.float32).reshape(m.shape[-3], -1) for m in maps]
    grid, score = int(about["grid"]), maps[0]
    points = len(score)
    cell, rows = score.argmax(1), numpy.arange(points)
    score = score[rows, cell]
    weight = score.clip(0.01, 1) if about["merge"] == "confidence" else numpy.ones(points)
    table = numpy.array(about["neighbours"], int).reshape(points, -1)
    votes = weight[:, None] * numpy.reshape(about["repeats"], table.shape)
    total = weight.copy()
    numpy.add.at(total, table, votes)
    landmarks = numpy.empty((points, 2))
    for axis, corner in enumerate((cell % grid, cell // grid)):
        # Corners are added here, in full precision, whatever the maps were computed in.
        place = weight * (maps[1 + axis][rows, cell] + corner)
        if table.size:
            said = maps[3 + axis].reshape(*table.shape, -1)[rows, :, cell] + corner[:, None]
            numpy.add.at(place, table, votes * said)
        landmarks[:, axis] = place / total / grid
    return landmarks, score.clip(0, 1)
