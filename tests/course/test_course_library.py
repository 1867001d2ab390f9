"""What lessons measure and draw with: timings, the choice of a model, records, plots, pictures."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from authoring import pictures
from course import machine
from course.cli import build_parser, main
from course.commands import doctor
from course.lessons import FILES_OF_LESSON
from course.measure import timing
from course.measure.ladder_workload import ladder_workload
from course.models import choice
from course.show import plots
from course.show.svg import Picture
from course.stages import Recompute, records

matplotlib.use("agg")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def result(tiny_model):
    workload = ladder_workload(290, "cpu").first(2)
    return Recompute(tiny_model(), "cpu").run(replace(workload, num_outputs=[4, 2]))


# -- timing --------------------------------------------------------------------------------------


def test_measure_warms_up_and_counts_the_rest():
    calls = []
    timed = timing.measure(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5
    assert len(timed.seconds) == 3
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        timing.measure(list, repeats=0)


def test_a_timing_says_its_median_and_its_spread():
    assert str(timing.Timing((0.003, 0.001, 0.002))) == "2 ms (1 to 3 ms, 3 runs)"
    assert str(timing.Timing((2.5,))) == "2.5 s (2.5 to 2.5 s, 1 runs)"
    assert str(timing.Timing((4e-6, 5e-6))).startswith("4.5 µs")


def test_the_machines_peaks_are_measured_in_what_the_engine_computes_in(monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(timing, "measure_peaks", lambda device, dtype: asked.append(dtype))
    timing.machine_peaks("cpu")
    assert asked == [torch.float32]


def test_a_peak_of_memory_begins_anew():
    def peak_of(megabytes):
        machine.reset_peak_memory("cpu")
        held = bytearray(megabytes * 2**20)
        held[:: 2**12] = b"x" * len(held[:: 2**12])  # touch every page
        return machine.peak_memory_bytes("cpu")

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux resets a process's peak")
    assert peak_of(400) - peak_of(1) > 300 * 2**20


# -- the choice of a model -----------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A checkpoint of the course's own, and no variable set."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    monkeypatch.setattr(choice, "CHECKPOINTS", tmp_path)
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    return str(tmp_path / "small")


def test_on_a_cpu_everything_runs_the_courses_own_model(own, monkeypatch):
    monkeypatch.setattr(choice, "has_gpu", lambda: False)
    assert choice.pick_model() == choice.text_model().path == choice.measured_model().path == own


def test_on_a_gpu_text_and_measuring_differ_and_say_so(own, monkeypatch):
    monkeypatch.setattr(choice, "has_gpu", lambda: True)
    monkeypatch.setattr(choice, "random_model_dir", lambda: Path("/made/random"))
    monkeypatch.setattr(choice, "is_downloaded", lambda model: False)
    assert choice.text_model().path == own
    assert choice.measured_model().path == "/made/random"
    assert "a random model of Qwen3-0.6B's shape" in str(choice.measured_model())
    monkeypatch.setattr(choice, "is_downloaded", lambda model: True)
    assert choice.text_model().path == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("gpu", [False, True])
def test_one_variable_decides_for_everything(own, monkeypatch, gpu):
    monkeypatch.setattr(choice, "has_gpu", lambda: gpu)
    monkeypatch.setenv("COURSE_MODEL", "some/model")
    chosen = [choice.pick_model(), choice.text_model().path, choice.measured_model().path]
    assert chosen == ["some/model"] * 3
    assert choice.pick_model("named") == "named"


def test_a_tilde_in_a_models_path_is_the_users_home(own, monkeypatch, tmp_path):
    """No shell replaces it in `make run MODEL=~/x` inside quotes, nor in `--model=~/x`."""
    monkeypatch.setattr(choice, "has_gpu", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COURSE_MODEL", "~/mine")
    chosen = [choice.pick_model(), choice.text_model().path, choice.measured_model().path]
    assert chosen == [str(tmp_path / "mine")] * 3
    assert choice.pick_model("~/named") == str(tmp_path / "named")


def test_a_tilde_in_a_file_that_a_command_writes_is_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "x.json"
    for command, option in (("bench workloads", "json"), ("ladder", "json"), ("progress", "svg")):
        parsed = build_parser().parse_args([*command.split(), f"--{option}=~/x.json"])
        assert getattr(parsed, option) == file
    drawn = build_parser().parse_args(["ladder", "--draw", "~/x.json", "~nobody-here/x"])
    assert drawn.draw == [file, Path("~nobody-here/x")]


def test_make_passes_its_variable_on():
    for arguments in (["MODEL=a/b"], ["COURSE_MODEL=a/b"]):
        made = subprocess.run(
            ["make", "--dry-run", "--old-file=.venv/installed", "run", *arguments],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        assert "COURSE_MODEL='a/b'" in made.stdout


def test_nothing_is_asked_of_the_hub():
    assert not choice.is_downloaded("nobody/never-made-such-a-model")


def test_doctor_says_what_each_lesson_uses(monkeypatch, capsys):
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for lesson in FILES_OF_LESSON:
        assert re.search(rf"^  {lesson} +\S", printed, re.MULTILINE), lesson
    assert "text                   storyteller, the course's own model." in printed
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "triton" else real(p))
    main(["doctor"])
    assert "plain torch twins of the kernels" in capsys.readouterr().out


# -- records -------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_written(result, tmp_path):
    file = tmp_path / "stages.json"
    runs = [replace(result, seconds=seconds) for seconds in (1.0, 4.0, 2.0)]
    written = records.record(runs, file, command="course ladder 1 --runs 3")
    assert records.load(file, tmp_path / "none") == [written]
    assert written.numbers["tokens_per_second"] == 3.0
    assert written.spread["tokens_per_second"] == [1.5, 6.0]
    assert written.command == "course ladder 1 --runs 3"
    assert written.machine == machine.describe("cpu")
    assert "torch" in written.versions
    assert "/" not in written.model


def test_measuring_again_replaces_a_record_and_keeps_the_others(result, tmp_path):
    file = tmp_path / "stages.json"
    records.record(replace(result, number=2), file)
    records.record(result, file)
    records.record(replace(result, seconds=1.0), file)
    found = records.load(file, tmp_path)
    assert [row.stage for row in found] == [1, 2]
    assert found[0].numbers["seconds"] == 1.0
    with pytest.raises(ValueError, match="one stage and one workload"):
        records.make_record([result, replace(result, number=2)])


def test_shipped_records_come_first_and_a_spoilt_file_is_named(result, tmp_path):
    shipped, own = tmp_path / "shipped", tmp_path / "own.json"
    records.record(result, shipped / "stages_h200.json")
    records.record(result, own)
    assert [row.origin for row in records.load(own, shipped)] == ["shipped", "yours"]
    own.write_text(json.dumps([{"stage": 1}]))
    with pytest.raises(ValueError, match=r"own\.json holds no stage records"):
        records.load(own, shipped)


def test_the_ladder_command_measures_records_and_draws(tiny_model, tmp_path, monkeypatch, capsys):
    file, picture = tmp_path / "own.json", tmp_path / "ladder.svg"
    model = str(tiny_model())
    arguments = ["1", "2", "--model", model, "--requests", "2", "--json", str(file)]
    monkeypatch.setattr(plots, "load", lambda: records.load(file, tmp_path / "none"))
    assert main(["ladder", *arguments, "--draw", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "01 recompute:" in printed
    assert "against stage 01" in printed
    assert [row.stage for row in records.read(file, "yours")] == [1, 2]
    assert "contiguous cache" in picture.read_text()
    assert main(["ladder", "99"]) == 2
    before = file.read_bytes()
    assert main(["ladder", *arguments]) == 0, "it goes on from there"
    assert capsys.readouterr().out.count("recorded; --again") == 2
    assert file.read_bytes() == before
    assert main(["ladder", *arguments, "--runs", "2"]) == 0
    assert "recorded; --again" not in capsys.readouterr().out, "one run is not two"
    assert [row.runs for row in records.read(file, "yours")] == [2, 2]


def test_a_part_of_the_workload_stays_out_of_the_readers_ladder(capsys):
    assert main(["ladder", "1", "--requests", "2"]) == 2
    assert "--requests needs --json FILE" in capsys.readouterr().err


def test_a_stage_has_one_point_on_a_line_its_last(two_sources):
    numbers = two_sources[2].numbers | {"tokens_per_second": 4321.0}
    spread = two_sources[2].spread | {"tokens_per_second": [4321.0, 4321.0]}
    again = replace(two_sources[2], workload="another", numbers=numbers, spread=spread)
    figure = plots.ladder(records=[*two_sources, again])
    assert figure.alt_text.count("stage 01") == 2, "one of each source"
    assert "stage 01 stage 1: 4,321 tokens" in figure.alt_text


@pytest.mark.parametrize("name", ["x.jpg", "x"])
def test_the_ladder_is_drawn_to_svg_or_png(name, tmp_path, capsys):
    assert main(["ladder", "--draw", str(tmp_path / name)]) == 2
    assert "to .svg or .png, not" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_what_ships_is_drawn_alone_as_svg_and_png(two_sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "load", lambda: two_sources)
    files = [str(tmp_path / name) for name in ("a.svg", "b.svg", "c.png")]
    assert main(["ladder", "--shipped", "--draw", *files]) == 0
    assert f"The ladder is in {files[2]}." in capsys.readouterr().out
    svg, again, png = (Path(file).read_bytes() for file in files)
    assert svg == again
    assert b"recorded on NVIDIA H200" in svg
    assert b"yours" not in svg
    assert png.startswith(b"\x89PNG")


# -- plots ---------------------------------------------------------------------------------------


@pytest.fixture
def two_sources(result):
    ours = [records.make_record(replace(result, number=n, name=f"stage {n}")) for n in (1, 2)]
    theirs = [replace(row, origin="shipped", machine="NVIDIA H200") for row in ours]
    return [*theirs, *ours]


def test_the_ladder_shows_both_sources_up_to_a_stage(two_sources, tmp_path):
    plots.use_style()
    file = tmp_path / "ladder.svg"
    figure = plots.ladder(records=two_sources)
    plots.save(figure, file)
    drawn = file.read_text()
    for text in (
        "recorded on NVIDIA H200",
        "yours, on",
        "output tokens a second",
        "MiB",
        "02 stage",
    ):
        assert text in drawn
    assert "stage 02" in figure.alt_text
    assert "NVIDIA H200" in figure.alt_text
    first = plots.ladder(upto=1, records=two_sources)
    assert "stage 02" not in first.alt_text
    assert len(drawn) < 100_000
    with pytest.raises(ValueError, match="no stage is recorded"):
        plots.ladder(records=[])


def test_a_shipped_record_says_that_it_was_not_measured_here(two_sources):
    shipped, *_, own = map(str, two_sources)
    assert shipped.endswith("live, as recorded")
    assert own.endswith("live")


def test_many_machines_fit_above_the_ladder(two_sources):
    plots.use_style()
    makers = ("Intel(R) Xeon(R) Platinum 8480+", "AMD EPYC 9654 96-Core", "NVIDIA H100 80GB HBM3",
              "NVIDIA RTX 6000 Ada Generation", "2 x NVIDIA A100-SXM4-80GB")  # fmt: skip
    rows = [replace(row, machine=maker) for row in two_sources for maker in makers]
    figure = plots.ladder(records=rows)
    figure.canvas.draw()
    title = figure.get_suptitle()
    assert all(maker in title.replace("\n", " ") for maker in makers)
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("upto", range(1, 9))
def test_ticks_of_the_ladders_panels_keep_apart(upto):
    """ "10,000" beside "0.1" would read as one number."""
    plots.use_style()
    figure = plots.ladder(
        upto=upto, records=records.load(own=ROOT / "figures/data/h100_stages.json")
    )
    figure.canvas.draw()
    left, right = (
        [label.get_window_extent() for label in a.get_xticklabels()] for a in figure.axes
    )
    speed, memory = (axes.bbox for axes in figure.axes)
    last = max(box.x1 for box in left if box.x0 < speed.x1)
    first = min(box.x0 for box in right if box.width and box.x1 > memory.x0)
    assert first - last > 0.2 * figure.dpi


def test_the_same_figure_gives_the_same_bytes(two_sources, tmp_path):
    plots.use_style()
    for name in ("a.svg", "b.svg"):
        plots.save(plots.ladder(records=two_sources), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_colours_never_stand_alone():
    assert len(plots.COLOURS) == len(plots.MARKERS) == len(plots.HATCHES)
    for kinds in (plots.COLOURS, plots.MARKERS, plots.HATCHES):
        assert len(set(kinds)) == len(kinds)
    plots.use_style()
    assert {"color", "marker"} == matplotlib.rcParams["axes.prop_cycle"].keys


def test_a_figure_names_its_machine():
    plots.use_style()
    fig, axes = plots.figure("Cost", "Some CPU, 1 thread", columns=2)
    assert fig.get_suptitle() == "Cost\nSome CPU, 1 thread"
    assert len(axes) == 2


# -- pictures ------------------------------------------------------------------------------------


def test_pictures_are_what_their_code_draws():
    assert pictures.outdated() == [], "run: python -m authoring.pictures"


def test_a_changed_picture_is_found(tmp_path):
    files = pictures.build(tmp_path)
    assert pictures.outdated(tmp_path) == []
    files[0].write_text(files[0].read_text() + " ")
    assert pictures.outdated(tmp_path) == [files[0].stem]
    files[1].unlink()
    assert pictures.outdated(tmp_path) == [file.stem for file in files[:2]]


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_whole_has_alt_text_and_keeps_inside_its_frame(name):
    picture = pictures.PICTURES[name]()
    root = ElementTree.fromstring(picture.svg())
    assert len(pictures.alt_text(name)) > 80
    assert picture.width <= 700, "readable without scaling on a laptop"
    assert "http" not in picture.svg().replace("http://www.w3.org/2000/svg", "")
    for element in root.iter("{http://www.w3.org/2000/svg}text"):
        size, text = float(element.get("font-size")), element.text
        width = size * len(text) * (0.605 if "Mono" in element.get("font-family") else 0.66)
        left = (
            float(element.get("x"))
            - width * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")]
        )
        assert left >= 0, text
        assert left + width <= picture.width, text
        assert 0 < float(element.get("y")) < picture.height, text
        assert size >= 10, text


def test_the_map_shows_every_lesson_and_every_file():
    drawn = pictures.PICTURES["course_map"]().svg()
    for stem, files in FILES_OF_LESSON.items():
        assert f">{stem[3:].replace('_', ' ')}<" in drawn
        for file in files:
            assert f">{file}<" in drawn


def test_text_is_escaped_and_numbers_are_short():
    picture = Picture(100, 50, "a < b", "x & y")
    picture.text((10.123, 20), "1 < 2")
    assert "1 &lt; 2" in picture.svg()
    assert "x='10.1'" in picture.svg()
    ElementTree.fromstring(picture.svg())
