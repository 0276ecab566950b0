"""tools.reports, the check of inputs that people reported."""
import pytest

from tools import reports


def test_every_reported_label_file_is_read(shared, capsys):
    folder = shared / "data" / "reports"
    found = reports.check(folder, reports.LABELS)
    assert [line for line in found if not line[1]] == []
    # Every input of the folder has a check.
    inputs = {f"labels/{path.name}" for path in (folder / "labels").iterdir()}
    assert inputs == {*reports.LABELS, "labels/five.yaml"}


def _films(shared, *names):
    found = reports.check(shared / "data" / "reports", {name: reports.FILMS[name]
                                                        for name in names})
    assert [line for line in found if not line[1]] == []


def test_reported_films_with_a_gap_are_shown_alike(shared):
    _films(shared, "film/gap.mp4", "film/gap.mkv", "../films/vertical_headline.mp4")


@pytest.mark.slow
def test_every_reported_film_is_shown_right(shared):
    _films(shared, *reports.FILMS)
    folder = shared / "data" / "reports"
    inputs = {f"{part}/{path.name}" for part in ("film", "sar")
              for path in (folder / part).iterdir()}
    assert inputs == {name for name in reports.FILMS if not name.startswith("..")}


def test_wrong_and_refused_inputs_are_named(tmp_path, capsys, monkeypatch):
    table = tmp_path / "labels" / "boxes_bom.csv"
    table.parent.mkdir()
    table.write_text("image,x_min,y_min,x_max,y_max\n134212_1.jpg,10,10,100,101\n")
    table.with_name("boxes_semi.csv").write_text("image\n")
    chosen = {name: reports.LABELS[name] for name in ("labels/boxes_bom.csv",
                                                      "labels/boxes_semi.csv")}
    monkeypatch.setattr(reports, "LABELS", chosen)
    monkeypatch.setattr(reports, "FILMS", {})
    assert reports.main([str(tmp_path)]) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("WRONG labels/boxes_bom.csv: found [('134212_1.jpg', [10.0")
    assert "has no column x_min; expected image,x_min,y_min,x_max,y_max, found 'image'" in second
    assert last == "0 of 2 inputs are right"
