# Two commands; each makes a virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv

train: $(VENV)/installed          ## the main job; flags go in ARGS, e.g. make train ARGS="--seed 1 --out runs/seed1"
	$(VENV)/bin/python train.py --env scienceworld $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q $(ARGS)

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: train test
