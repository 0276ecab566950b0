"""Landmark schemes: flip tables, mean faces, neighbours, subsets, 98 to 68 points, YAML schemes."""
import dataclasses

import numpy
import pytest
import scipy.optimize

from nets import head
from utils.errors import UserError
from utils.landmarks import schemes as landmarks
from utils.landmarks.schemes import SCHEMES

ALL = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
POINTS = {"300W": 68, "WFLW": 98, "COFW": 29, "AFLW": 19, "LaPa": 106, "eyes": 12}


def mirrored(scheme):
    """The mirrored mean face, its points reordered by the flip table."""
    face = scheme.mean_face[scheme.flip].copy()
    face[:, 0] = scheme.mean_face[:, 0].min() + scheme.mean_face[:, 0].max() - face[:, 0]
    return face


@ALL
def test_flip_is_its_own_inverse(scheme):
    assert scheme.points == POINTS[scheme.name]
    assert scheme.flip[scheme.flip].tolist() == list(range(scheme.points))


@ALL
def test_flip_maps_the_mean_face_onto_itself(scheme):
    assert abs(mirrored(scheme) - scheme.mean_face).max() < 0.08


@ALL
def test_no_other_flip_table_fits_better(scheme):
    # WFLW's lip corners and LaPa's pupils are closer to each other than the mean face is symmetric,
    # so the best assignment of all points is compared, not the nearest point of each.
    distance = numpy.linalg.norm(mirrored(scheme)[:, None] - scheme.mean_face[None], axis=-1)
    assert scipy.optimize.linear_sum_assignment(distance)[1].tolist() == list(range(scheme.points))
    if scheme.name not in ("WFLW", "LaPa"):
        assert distance.argmin(1).tolist() == list(range(scheme.points))


@ALL
def test_regions_are_in_range_and_the_right_ones_are_left_in_the_image(scheme):
    for name, points in scheme.regions.items():
        assert all(0 <= i < scheme.points for i in points), name
        if name.startswith("right"):
            left = scheme.regions[name.replace("right", "left")]
            assert scheme.mean_face[points, 0].max() < scheme.mean_face[left, 0].min()
            assert sorted(scheme.flip[points]) == sorted(left)
    if scheme.base is None:
        assert sorted(i for points in scheme.regions.values() for i in points) \
            == list(range(scheme.points))


@ALL
def test_divisor_is_a_pair_of_mirror_partners(scheme):
    if scheme.name == "AFLW":
        assert scheme.divisor is None
    else:
        first, second = scheme.divisor
        assert scheme.flip[first] == second
        assert scheme.mean_face[first, 0] < scheme.mean_face[second, 0]


@pytest.mark.parametrize(("name", "first"), [("300W", 36), ("WFLW", 60), ("eyes", 0), ("COFW", 8)])
def test_eyes_are_contours_that_start_at_a_corner(name, first):
    scheme = SCHEMES[name]
    right, left = scheme.eyes
    assert right[0] == first
    for eye in (right, left):
        contour = scheme.mean_face[eye]
        ends = contour[0], contour[len(eye) // 2]
        assert sorted([ends[0][0], ends[1][0]]) == [contour[:, 0].min(), contour[:, 0].max()]
        upper, lower = contour[1:len(eye) // 2], contour[len(eye) // 2 + 1:]
        assert upper[:, 1].max() < lower[:, 1].min()


def test_eyes_scheme_is_points_36_to_47_of_300w():
    eyes = SCHEMES["eyes"]
    assert (eyes.base, eyes.indices, eyes.divisor) == ("300W", tuple(range(36, 48)), (0, 9))
    assert eyes.flip.tolist() == [9, 8, 7, 6, 11, 10, 3, 2, 1, 0, 5, 4]


@pytest.mark.parametrize(("name", "points"), [("eyes", range(36, 48)), ("mouth", range(48, 68)),
                                          ("brows", range(17, 27)), ("contour", range(17))])
def test_parts_of_a_set_by_name(name, points):
    whole = SCHEMES["300W"]
    part = landmarks.get_scheme(name)
    assert (part.name, part.base, part.indices) == (name, "300W", tuple(points))
    assert set(part.regions) == set(landmarks.PARTS[name])
    # Parts of another set are that set's points.
    wflw = landmarks.model_scheme(name, SCHEMES["WFLW"])
    assert wflw.base == "WFLW"
    assert wflw.points == {"eyes": 16, "mouth": 20, "brows": 18,
                                                   "contour": 33}[name]
    for region, indices in wflw.regions.items():
        assert [wflw.indices[i] for i in indices] == SCHEMES["WFLW"].regions[region]
    assert landmarks.is_part_of(part, whole)
    assert not landmarks.is_part_of(wflw, whole)


def test_a_part_without_its_region_is_refused():
    nose = SCHEMES["300W"].subset(range(27, 36))
    with pytest.raises(UserError, match="no region 'lips', which part mouth needs"):
        landmarks.get_scheme("mouth", nose)
    with pytest.raises(UserError, match="nearest: mouth"):
        landmarks.get_scheme("mouths")


def test_mean_faces_are_the_published_ones(shared):
    for name in ("300W", "WFLW", "COFW", "AFLW", "LaPa"):
        published = numpy.loadtxt(shared / "reference" / "mean_faces" / f"{name}.txt")
        assert numpy.allclose(SCHEMES[name].mean_face.ravel(), published.ravel(), atol=1e-5)


def test_neighbours_are_nearest_first():
    face = [[0, 0], [1, 0], [3, 0], [7, 0]]
    assert head.nearest_neighbours(face, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert head.nearest_neighbours(face, 0).shape == (4, 0)


@pytest.mark.parametrize("num_nb", [-1, 4, 10])
def test_neighbours_need_enough_points(num_nb):
    with pytest.raises(UserError, match="0..3"):
        head.nearest_neighbours(numpy.zeros((4, 2)), num_nb)


def test_neighbours_need_a_mean_face():
    with pytest.raises(UserError, match="mean face"):
        head.nearest_neighbours(numpy.full((4, 2), numpy.nan), 2)


def test_reverse_neighbours():
    table = numpy.array([[1, 2], [0, 2], [1, 0], [2, 1]])
    predictors, slots, mask = head.reverse_neighbours(table)
    # Point 1 is the neighbour of 0 (slot 0), 2 (slot 0) and 3 (slot 1); nobody predicts point 3.
    assert (predictors[1].tolist(), slots[1].tolist()) == ([0, 2, 3], [0, 0, 1])
    assert mask.sum(1).tolist() == [2, 3, 3, 0]
    # Point 0 has two predictors: the third is the first again.
    assert (predictors[0].tolist(), mask[0].tolist()) == ([1, 2, 1], [True, True, False])


def test_reverse_neighbours_of_300w_cover_the_table_once():
    table = head.nearest_neighbours(SCHEMES["300W"].mean_face, 10)
    predictors, slots, mask = head.reverse_neighbours(table)
    assert predictors.shape == (68, 22)  # 22 is the longest list for M = 10.
    assert mask.sum() == 680
    target = numpy.broadcast_to(numpy.arange(68)[:, None], mask.shape)
    assert (table[predictors, slots] == target)[mask.any(1)].all()
    assert len(set(zip(predictors[mask].tolist(), slots[mask].tolist()))) == 680


def test_reverse_of_no_neighbours_is_empty():
    predictors, slots, mask = head.reverse_neighbours(numpy.zeros((5, 0), int))
    assert predictors.shape == slots.shape == mask.shape == (5, 0)


def test_subset_keeps_order_partners_and_regions():
    scheme = SCHEMES["300W"].subset([45, 30, 36], "three")
    assert (scheme.name, scheme.base, scheme.indices) == ("three", "300W", (45, 30, 36))
    assert scheme.flip.tolist() == [2, 1, 0]
    assert scheme.divisor == (2, 0)
    assert scheme.regions == {"nose bridge": [1], "right eye": [2], "left eye": [0]}
    assert (scheme.mean_face == SCHEMES["300W"].mean_face[[45, 30, 36]]).all()
    assert SCHEMES["300W"].subset([30, 33]).divisor is None


@pytest.mark.parametrize(("indices", "message"), [
    ([36], "partner 45"), ([68], "0..67, not 68"), ([-1], "not -1"), ([30, 30], "different"),
    ([], "different")])
def test_bad_subsets(indices, message):
    with pytest.raises(UserError, match=message):
        SCHEMES["300W"].subset(indices)


def test_get_scheme():
    assert landmarks.get_scheme("WFLW") is SCHEMES["WFLW"]
    assert landmarks.get_scheme(SCHEMES["COFW"]) is SCHEMES["COFW"]
    assert landmarks.get_scheme("36-41, 42-47").indices == tuple(range(36, 48))
    assert landmarks.get_scheme([60, 72], SCHEMES["WFLW"]).divisor == (0, 1)
    with pytest.raises(UserError, match="nearest: WFLW"):
        landmarks.get_scheme("WLFW")
    with pytest.raises(UserError, match="written as"):
        landmarks.get_scheme("1-2-3")


@ALL
def test_state_round_trip(scheme):
    again = landmarks.Scheme.from_state(scheme.state())
    assert again.state() == scheme.state()
    assert again.eyes == scheme.eyes


def test_broken_state():
    state = SCHEMES["AFLW"].state()
    with pytest.raises(UserError, match="mean_face"):
        landmarks.Scheme.from_state({k: v for k, v in state.items() if k != "mean_face"})
    with pytest.raises(UserError, match="permutation"):
        landmarks.Scheme.from_state({**state, "flip": [0] * 19})
    with pytest.raises(UserError, match="takes point 0 to 1, and 1 to 2"):
        landmarks.Scheme.from_state({**state, "flip": [1, 2, 0, *range(3, 19)]})
    with pytest.raises(UserError, match="divisor"):
        landmarks.Scheme.from_state({**state, "divisor": [0, 19]})


def test_wflw_to_300w_of_the_mean_faces():
    mapped, face = (landmarks.wflw_to_300w(SCHEMES["WFLW"].mean_face), SCHEMES["300W"].mean_face)
    mapped, face = ((f - f[17:].min(0)) / (f[17:].max(0) - f[17:].min(0)) for f in (mapped, face))
    assert abs(mapped - face).max() < 0.1
    distance = numpy.linalg.norm(mapped[:, None] - face[None], axis=-1)
    assert scipy.optimize.linear_sum_assignment(distance)[1].tolist() == list(range(68))


def test_wflw_to_300w_commutes_with_flips_and_translations():
    generator = numpy.random.default_rng(0)
    faces = generator.uniform(0, 500, (3, 98, 2))
    mirror = [-1, 1]
    assert numpy.allclose(landmarks.wflw_to_300w(faces[:, SCHEMES["WFLW"].flip] * mirror),
                          landmarks.wflw_to_300w(faces)[:, SCHEMES["300W"].flip] * mirror)
    # Weights that do not sum to 1 would pull a distant face towards the origin.
    assert numpy.allclose(landmarks.wflw_to_300w(faces + 1e4), landmarks.wflw_to_300w(faces) + 1e4)


GOOD = """
name: five
names: [right eye, left eye, nose, right mouth, left mouth]
flip: [[right eye, left eye], [3, 4]]
divisor: [0, left eye]
regions: {mouth: [right mouth, 4]}
mean_face: [[0.2, 0.3], [0.8, 0.3], [0.5, 0.5], [0.3, 0.8], [0.7, 0.8]]
"""


def test_read_scheme(tmp_path):
    (tmp_path / "five.yaml").write_text(GOOD)
    scheme = landmarks.get_scheme(tmp_path / "five.yaml")
    assert (scheme.name, scheme.points, scheme.divisor) == ("five", 5, (0, 1))
    assert scheme.flip.tolist() == [1, 0, 2, 4, 3]
    assert scheme.regions == {"mouth": [3, 4]}
    assert scheme.names[3:] == ("right mouth", "left mouth")
    assert scheme.subset([4, 3]).names == ("left mouth", "right mouth")
    assert scheme.mean_face[4].tolist() == [0.7, 0.8]
    assert scheme.eyes is None


def test_read_scheme_accepts_all_forms_of_flip_and_divisor(tmp_path):
    path = tmp_path / "own.yaml"
    for text, flip, divisor, mirrors in (
            ("names: [a, b, c]\nflip: [b, a, c]\ndivisor: diagonal", [1, 0, 2], "diagonal", True),
            ("\ufeffpoints: 3\nflip: [1, 0, 2]\ndivisor: box", [1, 0, 2], None, True),
            ("points: 2\nflip: [[0, 1]]\ndivisor: [0, 1]", [1, 0], (0, 1), True),
            ("points: 2\nflip: none", [0, 1], None, False),
            ("points: 2\nflip: []", [0, 1], None, True),
            ("points: 2", [0, 1], None, False)):
        path.write_text(text, encoding="utf-8")
        scheme = landmarks.read_scheme(path)
        for found in (scheme, landmarks.Scheme.from_state(scheme.state())):
            assert (found.flip.tolist(), found.divisor, found.mirrors) == (flip, divisor, mirrors)
    assert scheme.with_mean_face([[0, 0], [1, 0]]).subset([1]).divisor is None
    diagonal = dataclasses.replace(scheme.with_mean_face([[0, 0], [1, 0]]), divisor="diagonal")
    assert diagonal.subset([1]).divisor == "diagonal"


def test_read_scheme_with_points_only(tmp_path):
    (tmp_path / "least.yaml").write_text("points: 3\n")
    scheme = landmarks.read_scheme(tmp_path / "least.yaml")
    assert (scheme.points, scheme.divisor, scheme.flip.tolist()) == (3, None, [0, 1, 2])
    with pytest.raises(UserError, match="mean face"):
        head.nearest_neighbours(scheme.mean_face, 2)
    complete = scheme.with_mean_face([[0, 0], [1, 0], [3, 0]])
    assert head.nearest_neighbours(complete.mean_face, 1).tolist() == [[1], [0], [1]]
    with pytest.raises(UserError, match="2 points"):
        scheme.with_mean_face([[0, 0], [1, 0]])


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected keys"),
    ("just words", "expected keys"),
    ("points: [", "cannot be read"),
    ("\x00\x01", "cannot be read"),
    ("flip: [[0, 1]]", "needs names"),
    ("points: 0", "found 0"),
    ("points: 1", r"points \(2..10000\), found 1"),
    ("points: 2\npoints: 3", "key points is there twice"),
    ("points: 2\nname: 300W", "name: 300W is a built-in scheme"),
    ("points: 2\nflip: no", "flip is a list of pairs, or none, found False"),
    ("points: 2\nflip:", "flip is a list of pairs, or none, found None"),
    ("points: true", "found True"),
    ("points: many", "found 'many'"),
    ("points: 3\nnames: [a, b]", "3 different names"),
    ("names: [a, a]", "2 different names"),
    ("points: 3\nflips: []", "unknown key 'flips'.*nearest: flip"),
    ("points: 3\nflip: [[0, 3]]", "no point 3"),
    ("points: 3\nflip: [[0, nose]]", "no point 'nose'"),
    ("points: 3\nflip: [0, 1]", "list of pairs"),
    ("points: 3\nflip: 5", "list of pairs"),
    ("points: 999999999999", "2..10000"),
    ("points: 2\nmean_face: [[.nan, 1], [1, 1]]", "finite"),
    ("points: 3\nflip: [[0, 1], [1, 2]]", "names a point twice"),
    ("points: 3\nflip: [[1, 1]]", "names a point twice"),
    ("points: 4\nflip: [[0, 1], [3, 1]]", r"flip pair \[3, 1\].*in \[0, 1\] already"),
    ("points: 3\nflip: [1, 2, 0]", "takes point 0 to 1, and 1 to 2: a face mirrored twice"),
    ("names: [a, b, c]\nflip: [b, b, c]", "takes point a to b, and b to b"),
    ("points: 3\nflip: [[0, 1], 2]", "list of pairs, found 2"),
    ("names: ['eye, right', nose]", "'eye, right' has a comma"),
    ("names: [eye, nose, eye]", "'eye' is there twice, for points 0 and 2"),
    ("names: [eye, '']", "name 1 is ''"),
    ("names: [eye, ~]", "name 1 is None"),
    ("names: [eye, 0]", "0 is the name of point 1"),
    ("names: eye", "needs names"),
    ("names: [right eye, left eye]\ndivisor: [right eye, left ey]", "'left ey'.*nearest: left eye"),
    ("points: 3\ndivisor: eyes", "two points, box or diagonal, found 'eyes'"),
    ("points: 3\ndivisor: 1", "divisor is two points"),
    ("points: 3\ndivisor: [1, 1]", "same point"),
    ("points: 3\nregions: [1, 2]", "regions maps"),
    ("points: 3\nregions: {a: [9]}", "no point 9"),
    ("points: 3\nmean_face: [[0, 1], [2, 3]]", "3 pairs"),
    ("points: 2\nmean_face: [[0, 1], [2, x]]", "2 pairs"),
])
def test_bad_scheme_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        landmarks.read_scheme(path)
    assert "bad.yaml" in str(caught.value)


def test_absent_scheme_file(tmp_path):
    with pytest.raises(UserError, match="absent.yaml"):
        landmarks.get_scheme(str(tmp_path / "absent.yaml"))
