"""tools.same: hashes, and the comparison of two records."""
import numpy
import torch

from tools import same


def test_changed_missing_and_new_entries_are_found():
    rows = same.compare({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "0", "d": "4"})
    assert rows == [("a", "1", "1"), ("b", "2", "0"), ("c", "3", "absent"), ("d", "absent", "4")]


def test_a_bit_a_name_or_a_type_changes_the_hash():
    value = numpy.float32(1)
    digests = [same.digest({"w": torch.tensor(v)}) for v in (1.0, float(numpy.nextafter(value, 2)))]
    digests += [same.digest({"v": torch.tensor(1.0)}), same.digest({"w": torch.tensor(1)})]
    assert len(set(digests)) == 4
    assert same.digest({"w": torch.tensor(1.0)}) == digests[0]
