# Commands: train, test and lesson. Each makes a virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
PLOT = $(VENV)/bin/python plot.py $(ARGS)
SHORT = results/study/short/grpo-
CHECK = import sys; sys.version_info[:2] in ((3, 11), (3, 12)) or sys.exit("Python 3.11 or 3.12 is \
needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")

## the main job; flags go in ARGS, such as make train ARGS="--seed 1 --out runs/seed1"
train: $(VENV)/installed
	$(VENV)/bin/python train.py --env scienceworld $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q $(ARGS)

## opens docs/lesson.ipynb in a browser; "Run All" in its menu "Run" runs it
lesson: $(VENV)/lesson
	$(VENV)/bin/jupyter lab docs/lesson.ipynb $(ARGS)

lint: $(VENV)/bin/ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

## the pictures of README.md and docs/, from the committed logs
figures: $(VENV)/installed
	$(PLOT) --out figures
	$(VENV)/bin/python -m tools.study claims
	$(PLOT) --out figures/keyquest $(SHORT)plain-* $(SHORT)epo0.05-0.01-* \
		$(SHORT)epo0.05-0.1-* $(SHORT)epo3-0.1-*
	$(PLOT) --out figures/scienceworld results/study/scienceworld/grpo-*
	$(PLOT) --out figures/smollm2-keyquest GRPO=results/smollm2/keyquest-plain \
		GRPO+EPO=results/smollm2/keyquest-epo
	$(PLOT) --out figures/smollm2-scienceworld GRPO+EPO=results/smollm2/scienceworld-epo
	$(VENV)/bin/python -m tools.transcript --out figures/transcript.html \
		results/lr2e-3/tiny-grpo-plain-seed1 results/lr2e-3-strong/tiny-grpo-epo-seed0

define install
	@$(PYTHON) -c '$(CHECK)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(addprefix -r ,$(1))
	touch $@
endef

$(VENV)/installed: $(REQUIREMENTS)
	$(call install,$(REQUIREMENTS))

$(VENV)/lesson: requirements-lesson.txt requirements.txt
	$(call install,requirements-lesson.txt)

$(VENV)/bin/ruff: requirements-lint.txt
	$(call install,requirements-lint.txt)

.PHONY: train test lesson lint figures
