"""Comparing two records of tools.same finds what changed, came and went."""
import numpy
import same
import torch


def test_a_changed_an_absent_and_a_new_entry_are_found():
    rows = same.compare({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "0", "d": "4"})
    assert rows == [("a", "1", "1"), ("b", "2", "0"), ("c", "3", "absent"), ("d", "absent", "4")]


def test_one_bit_one_name_or_another_type_makes_another_hash():
    value = numpy.float32(1)
    digests = [same.digest({"w": torch.tensor(v)}) for v in (1.0, float(numpy.nextafter(value, 2)))]
    digests += [same.digest({"v": torch.tensor(1.0)}), same.digest({"w": torch.tensor(1)})]
    assert len(set(digests)) == 4
    assert same.digest({"w": torch.tensor(1.0)}) == digests[0]
