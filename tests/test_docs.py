"""README.md, CHANGELOG.md and docs/: links, lengths, command lines, code and figures."""
import contextlib
import functools
import io
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy
import pytest

import demo
from tools import growth, plot_models
from utils.args import ROOT, parse

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Words of a page, as `wc -w` counts them.
WORDS, UNLIMITED = 1500, ("experiments.md",)
# Flags of these programs are not of this repository.
FOREIGN = ("git ", "pip ", "pnnx ")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def name(page):
    return page.relative_to(ROOT).as_posix()


@functools.cache
def parts(page):
    """A page's [(language, code)] and its text without them."""
    code, text, language = [], [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = re.fullmatch(r" *```(\w*)", line)
        if fence and language is None:
            language = fence[1]
            code.append((language, []))
        elif fence:
            language = None
        else:
            (text if language is None else code[-1][1]).append(line)
    assert language is None, f"{page}: a code block without an end"
    return [(language, "\n".join(lines)) for language, lines in code], "\n".join(text)


def blocks(page, language):
    """The code blocks of a page with this language tag."""
    return [code for found, code in parts(page)[0] if found == language]


def prose(page):
    return parts(page)[1]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page):
    """The command lines of a page, with its shell variables filled in."""
    variables = {}
    for block in blocks(page, ""):
        for line in block.splitlines():
            assigned = re.fullmatch(r'(\w+)="(.*)"', line)
            if assigned:
                variables[assigned[1]] = assigned[2]
            for key, value in variables.items():
                line = line.replace(f"${key}", value)
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word in ("python", "bash")]
            for start, end in zip(starts, [*starts[1:], len(words)]):
                yield words[start:end]


@functools.cache
def flags_of(program, action=None):
    """The flags in the help of a module (-m) or script, without starting a process."""
    argv, text = sys.argv, io.StringIO()
    sys.argv = [program, *([action] if action else []), "--help"]
    is_file = program.endswith(".py")
    run, target = (runpy.run_path, str(ROOT / program)) if is_file else (runpy.run_module, program)
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            run(target, run_name="__main__")
    finally:
        sys.argv = argv
    return set(FLAG.findall(text.getvalue()))


def programs():
    """(program, subcommand) of every Python program that a page calls."""
    found = {("main.py", None), ("demo.py", None)}
    for page in GUIDES:
        for words in commands(page):
            if words[0] == "python" and len(words) > 1 and words[1] != "-c":
                rest = words[2:] if words[1] == "-m" else words[1:]
                action = rest[1] if rest[0] in ("tools.experiments", "tools.growth") else None
                found.add((rest[0], action))
    return sorted((p for p in found if p[0] not in ("pytest", "venv")), key=str)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in (link for link in links if not re.match(r"https?:", link)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_pages_are_short(page):
    if page.name not in UNLIMITED:
        assert len(page.read_text(encoding="utf-8").split()) <= WORDS


def test_every_page_and_picture_is_linked():
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES
              for link in re.findall(r"\]\(([^)\s]+)\)", prose(page))}
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "assets").iterdir()]
    assert not {name(path) for path in files if path not in linked}


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_command_lines_parse(page):
    for words in commands(page):
        if words[:2] == ["bash", "main.sh"]:
            assert words[2].isdigit(), words
            parse(words[3:])
        elif words[:2] == ["python", "main.py"]:
            parse(words[2:])
        elif words[:2] == ["python", "demo.py"]:
            demo.parse(words[2:])
        elif words[0] == "python" and len(words) > 1 and words[1] != "-c":
            rest = words[2:] if words[1] == "-m" else words[1:]
            if rest[0] in ("pytest", "venv"):
                continue
            action = rest[1] if (rest[0], rest[1:2] and rest[1]) in programs() else None
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert given <= flags_of(rest[0], action), words


def test_the_parsers_refuse_unknown_flags():
    with pytest.raises(Exception, match="--epoch"):
        parse(["--train", "--epoch", "3"])
    assert "--target-size" in flags_of("utils.data.generator")
    assert "--size" not in flags_of("utils.data.generator")


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_flags_in_the_text_exist(page):
    known = {"--help"}.union(*(flags_of(*program) for program in programs()))
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if not code.startswith(FOREIGN):
            assert set(FLAG.findall(code)) <= known, code


@pytest.mark.parametrize(("page", "index"), [("README.md", 0), ("README.md", 1),
                                             ("docs/deploy.md", 0)])
def test_python_code_runs(page, index, tmp_path):
    import cv2
    import matplotlib
    portrait = pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    shutil.copy(portrait, tmp_path / "photo.jpg")
    # The square around the face of the portrait: centre and side in pixels.
    x, y, side = 260, 200, 190
    half = int(0.6 * side)
    photo = cv2.imread(str(portrait))
    cv2.imwrite(str(tmp_path / "face.png"), photo[y - half:y + half, x - half:x + half])
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    code = blocks(ROOT / page, "python")[index]
    code += "\nimport numpy\nnumpy.savez('out.npz', landmarks=landmarks, confidence=confidence)\n"
    done = subprocess.run([sys.executable, "-c", code, "photo.jpg", str(x), str(y), str(side)],
                          cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, text=True,
                          capture_output=True)
    assert not done.returncode, done.stderr
    found = numpy.load(tmp_path / "out.npz")
    assert found["landmarks"].shape == (1, 68, 2)
    assert found["confidence"].shape == (1, 68)
    assert found["confidence"].mean() > 0.4


def test_the_plot_of_the_models_has_the_figures_of_the_tables():
    def rows(page):
        """{model: cells after it} of the rows that begin with a model's name in code."""
        found = re.findall(r"^\| (?:\[`|`)?([\w, ]+?)(?:`\]\([^)]*\)|`)?(?:, [^|]*)? \|(.*)\|$",
                           page.read_text(encoding="utf-8"), re.M)
        return [(model, [cell.strip() for cell in cells.split("|")]) for model, cells in found]

    readme = dict(rows(ROOT / "README.md"))
    pages = rows(ROOT / "docs" / "results.md")
    for model, (work, common, lfpw, int8) in plot_models.OURS.items():
        assert readme[model][1:3] == [str(work), f"{lfpw:.2f}"]
        shipped, published = (cells for key, cells in pages if key == model)
        assert shipped[6] == f"{int8:.2f}"
        assert published[1] == f"{common:.2f}"
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for model, (work, common) in plot_models.PUBLISHED.items():
        row = model.replace("PIPNet R", "PIPNet, ResNet")
        line, = re.findall(rf"^\| {row}\b.*$", text, re.M)
        assert f"| {common:.2f} |" in line
        assert f"| {work or ''} |".replace("  ", " ") in line


def test_the_growth_plot_reads_the_tables_of_the_experiments():
    assert len(growth.stages()) == 6
    assert growth.stages()["128 px, tiny"] == [(0.4, 3.561), (0.9, 3.458), (2.0, 3.403)]
    assert len(growth.rows("training faces")) == 4
    assert len(growth.rows("augmentation")) == 2
