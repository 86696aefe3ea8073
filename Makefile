# Two commands; each makes a virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt

train: $(VENV)/installed          ## the main job; flags go in ARGS, e.g. make train ARGS="--seed 1 --out runs/seed1"
	$(VENV)/bin/python train.py --env scienceworld $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q $(ARGS)

figures: $(VENV)/installed        ## the README's pictures, from committed logs
	$(VENV)/bin/python plot.py --out figures $(ARGS)
	$(VENV)/bin/python plot.py results/lr2e-3/*grpo-plain* results/lr2e-3/*grpo-epo* results/lr2e-3-lambda results/lr2e-3-strong --out figures $(ARGS)
	$(VENV)/bin/python plot.py results/lr1e-3/*plain* results/lr1e-3/*epo* results/lr1e-3-strong --out figures/lr1e-3 $(ARGS)
	$(VENV)/bin/python plot.py results/lr2e-3-strong results/lr2e-3-floor --out figures/floor $(ARGS)
	$(VENV)/bin/python plot.py results/lr2e-3/*ppo-plain* results/lr2e-3/*ppo-epo* --out figures/ppo $(ARGS)
	$(VENV)/bin/python plot.py results/sweep results/sweep-strong --out figures/healthy $(ARGS)
	$(VENV)/bin/python plot.py results/alfworld/*plain* results/alfworld/*epo* results/alfworld-strong --out figures/alfworld-healthy $(ARGS)
	$(VENV)/bin/python plot.py results/alfworld-lr2e-3/*plain* results/alfworld-lr2e-3/*epo* results/alfworld-lr2e-3-lambda results/alfworld-lr2e-3-strong --out figures/alfworld $(ARGS)
	$(VENV)/bin/python plot.py results/keyquest/*plain* results/keyquest/*epo* results/keyquest-0.1 results/keyquest-0.1-strong --out figures/keyquest $(ARGS)

$(VENV)/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

.PHONY: train test figures
