"""The lesson runs from top to bottom, its checks know right from wrong, and it reads without it."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import rollout
import train

LESSON = Path(__file__).parent.parent / "docs" / "lesson.ipynb"
CELLS = json.loads(LESSON.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
# the cell that has the whole algorithm
(ALGORITHM,) = [source for source in SOURCES if "loss.backward()\n    optimizer" in source]
SOLUTION = [cell for cell in CODE if "solution" in cell["metadata"].get("tags", ())]
# wrong answers, and what their checks then name
WRONG = {
    1: ("answer_1 = (0.375, 0.35, 1 / 6)", "the weight; the table of section 2"),
    2: ('answer_2 = {"loss", "entropy"}', "what changes where the gradient does not?"),
    3: ("answer_3 = 0.5", "draw_corridor with the smallest β_k"),
    4: ("answer_4 = lambda batch: 0.1", "the floor is half of it"),
    5: ('answer_5 = {"plain"}', "the right panel"),
}
# one update a step and a constant rate
FLAGS = {"env": "keyquest", "tasks": "short", "steps": 10, "max_tokens": 4, "minibatches": 1}
FLAGS |= {"entropy_coef": 0.01, "alpha": 3.0, "invalid_penalty": 0.0, "warmup": 0.0, "min_lr": 1.0}
outputs = lambda cells: [output for cell in cells for output in cell.get("outputs", ())]
pictures = lambda cells: sum("image/png" in out.get("data", {}) for out in outputs(cells))
printed = lambda cells: "".join("".join(out.get("text", "")) for out in outputs(cells))


@pytest.fixture(scope="module")
def lesson():
    """Its cells as they ran, and those of the wrong answers; the last exercise takes whole runs."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(LESSON, 4)
    answers = [cell for cell in notebook.cells if "answer" in cell.metadata.get("tags", ())]
    checks = [cell.source for cell in notebook.cells if "\ncheck(" in cell.source]
    for number in (1, 2, 3, 4):
        answers[number - 1].source = "\n".join("".join(c["source"]) for c in SOLUTION)
    new = nbformat.v4.new_code_cell
    wrong = [new(f"{WRONG[n][0]}\n{check}") for n, check in enumerate(checks, 1)]
    cells = list(notebook.cells)
    notebook.cells += [*wrong, new("print(temporary.name)")]
    resources = {"metadata": {"path": str(LESSON.parent)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESSON_STEPS", "2")
        nbclient.NotebookClient(notebook, timeout=None, resources=resources).execute()
    return cells, notebook.cells[len(cells) :]


def test_it_runs_draws_and_its_checks_know_right_from_wrong(lesson):
    cells, (*wrong, folder) = lesson
    assert "4 runs in" in printed(cells)
    assert pictures(cells) >= 7
    assert not Path(printed([folder]).strip()).exists()
    for number in (1, 2, 3, 4):
        assert f"Exercise {number}: right." in printed(cells)
    assert "Exercise 5: not answered yet." in printed(cells)
    for (number, (_, hint)), cell in zip(WRONG.items(), wrong, strict=True):
        assert f"Exercise {number}: not yet. Look at" in printed([cell])
        assert hint in printed([cell])


def test_its_outputs_are_committed_and_unanswered():
    assert all(cell["execution_count"] for cell in CODE)
    assert "error" not in {output["output_type"] for output in outputs(CODE)}
    assert pictures(CODE) >= 7
    assert "4 runs in" in printed(CODE)
    assert printed(CODE).count("not answered yet") == 5
    # no folder of a machine; pictures and widgets hold none
    shown = [output.get("data", {}).get("text/plain", "") for output in outputs(CODE)]
    assert not re.search(r"/(tmp|root|home|work|usr)\b", printed(CODE) + str(shown))


def test_its_cells_are_short_and_write_nothing_of_the_loss_again():
    for source in SOURCES:
        assert len(source.splitlines()) <= (48 if source == ALGORITHM else 30)
    code = "\n".join(SOURCES)
    assert not re.search(r"softmax|relu|clamp|np\.maximum|exp\(|from support\.(?!run_folder)", code)
    for name in ("token_weights", "smoothing_loss", "epo_loss", "batch_loss", "plot.draw"):
        assert f"{name}(" in code


def test_the_algorithm_in_one_cell_has_the_gradients_of_train(monkeypatch, tmp_path):
    """The cell alone, as it stands; then steps of train.py, with the episodes that it played."""
    played, gradients, of_cell = [], [], {}

    def keep(*args, collect=rollout.collect, **limits):
        played.append(collect(*args, **limits))
        return played[-1]

    def look(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    monkeypatch.setattr(rollout, "collect", keep)
    (tmp_path / "transcripts").mkdir()
    with register_optimizer_step_pre_hook(look):
        exec(ALGORITHM, of_cell)
        cfg = train.decide(FLAGS | {"out": str(tmp_path)})
        learner = train.make_learner(cfg, train.load_policy("tiny", "keyquest"))
        schedules = train.make_schedules(cfg, learner, 0)
        for k in range(3):
            monkeypatch.setattr(train, "collect", lambda *_: played[k])
            train.rl_step(of_cell["world"], learner, of_cell["tasks"], schedules, cfg, k)
            off = (gradients[-1] - gradients[k]).norm() / gradients[k].norm()
            assert off < 1e-5
    assert len(gradients) == 10 + 3


def test_links_of_its_text_lead_somewhere():
    text = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    # a notebook's headings keep their capitals
    anchors = {"#" + heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M)}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) > 8
    for link in links:
        assert link in anchors or (LESSON.parent / link).is_file(), link
