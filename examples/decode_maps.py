"""Decode the maps of a .raw.onnx to landmarks; needs numpy only.

`python main.py --export --raw --exp NAME` writes NAME.raw.onnx, a graph that ends in the maps of a
PIP head, and NAME.raw.json with what decoding needs. Run the graph in any runtime, then:

    import json, decode_maps
    metadata = json.load(open("weights/fast.raw.json"))
    landmarks, confidence = decode_maps.decode(maps, metadata)
"""
import numpy


def decode(maps: list, metadata: dict) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Decode the maps of one face (PIPNet, section 3.2).

    The cell with the best score gives a landmark's own position and predicts that of its
    neighbours. A landmark's result is the mean of all predictions of it.

    Args:
        maps: the outputs of the graph in its order, each (1, C, G, G) or (C, G, G): score,
            offset_x, offset_y (C = K landmarks) and, with neighbours, neighbour_x, neighbour_y
            (C = K * M neighbours).
        metadata: content of the .raw.json; or the ONNX file's metadata, its JSON values parsed.

    Returns:
        Landmarks (K, 2), x then y in 0..1 of the crop, and confidence (K,) in 0..1.
    """
    maps = [numpy.asarray(m, numpy.float32).reshape(m.shape[-3], -1) for m in maps]
    grid, score = int(metadata["grid"]), maps[0]
    points = len(score)
    rows = numpy.arange(points)
    cell = score.argmax(1)
    score = score[rows, cell]

    # Weight of each prediction: 1, or the score of the landmark that makes it; times the number of
    # repeats for predictions of neighbours.
    weight = score.clip(0.01, 1) if metadata["merge"] == "confidence" else numpy.ones(points)
    neighbours = numpy.array(metadata["neighbours"], int).reshape(points, -1)
    neighbour_weight = weight[:, None] * numpy.reshape(metadata["repeats"], neighbours.shape)
    total = weight.copy()
    numpy.add.at(total, neighbours, neighbour_weight)

    landmarks = numpy.empty((points, 2))
    for axis, corner in enumerate((cell % grid, cell // grid)):  # x, then y
        # The maps hold offsets from the corner of a cell, in cells. The corner is added in float64,
        # whatever precision the maps have.
        position = weight * (maps[1 + axis][rows, cell] + corner)
        if neighbours.size:
            predicted = maps[3 + axis].reshape(*neighbours.shape, -1)[rows, :, cell]
            predicted = predicted + corner[:, None]
            numpy.add.at(position, neighbours, neighbour_weight * predicted)
        landmarks[:, axis] = position / total / grid
    return landmarks, score.clip(0, 1)
