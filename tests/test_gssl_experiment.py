"""tools.gssl_experiment: equal numbers of steps, and the committed list of labelled faces."""
import pytest

from tools import gssl_experiment
from utils.training import gssl, stages


@pytest.mark.parametrize(("labelled", "unlabelled", "steps", "rounds", "done"), [
    (180, 1795, 1500, 3, 3), (180, 1795, 6000, 15, 13), (1918, 5749, 9000, 15, 13),
    (1918, 5749, 1500, 15, 2)])
def test_methods_have_equal_steps(labelled, unlabelled, steps, rounds, done):
    alone, both = labelled // 16, (labelled + unlabelled) // 16
    repeated = gssl.repeats(labelled, unlabelled, stages.LABELLED) * labelled
    assert 1 / 2 <= repeated / (repeated + unlabelled) < 0.6
    plan = {m: gssl_experiment.epochs(m, labelled, unlabelled, steps, rounds)
            for m in ("supervised", "default", "paper")}
    assert plan["default"]["gssl_rounds"] == done
    assert plan["default"]["epochs"] * alone == pytest.approx(steps / 2, rel=0.2)
    found = [plan["supervised"]["epochs"] * alone,
             plan["default"]["epochs"] * alone
             + done * plan["default"]["gssl_epochs"] * ((repeated + unlabelled) // 32)]
    # Five rounds of "paper" with one epoch each can need more steps than the plan has.
    if 5 * both < steps:
        found.append(plan["paper"]["epochs"] * alone + 5 * plan["paper"]["gssl_epochs"] * both)
    assert found == pytest.approx([steps] * len(found), rel=0.05)


def test_the_committed_list_is_the_choice_by_hash(shared):
    from utils.data.readers import READERS
    faces = READERS["300W"].read(shared / "data" / "300W", [])
    names = [face.name for face in faces if "train" in face.lists]
    chosen = gssl_experiment.LIST.read_text().split()
    assert len(names) == 2012
    assert len(chosen) == 200
    assert gssl_experiment.choose(names) == chosen
    assert gssl_experiment.choose(names[::-1]) == chosen
