# Two commands; each makes a virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt

train: $(VENV)/installed          ## the main job; flags go in ARGS, e.g. make train ARGS="--seed 1 --out runs/seed1"
	$(VENV)/bin/python train.py --env scienceworld $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q $(ARGS)

figures: $(VENV)/installed        ## pictures of committed logs, into figures/
	$(VENV)/bin/python plot.py results/sweep --out figures $(ARGS)

$(VENV)/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

.PHONY: train test figures
