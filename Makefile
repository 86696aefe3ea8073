# Commands: train, test and lesson. Each makes a virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
STUDY = results/study/
CHECK = import sys; (3, 11) <= sys.version_info[:2] <= (3, 14) or sys.exit("Python 3.11 to 3.14 is \
needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")

## the main job; flags go in ARGS, such as make train ARGS="--seed 1 --out runs/seed1"
train: $(VENV)/installed
	$(VENV)/bin/python train.py --env scienceworld $(ARGS)

## two processes; the tests of a file share what they have made
test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile $(ARGS)

## opens docs/lesson.ipynb in a browser; "Run All" in its menu "Run" runs it
lesson: $(VENV)/lesson
	$(VENV)/bin/jupyter lab docs/lesson.ipynb $(ARGS)

lint: $(VENV)/bin/ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

## the pictures of README.md and docs/, from the committed logs
figures: $(VENV)/installed
	$(VENV)/bin/python -m figures.gradient
	$(VENV)/bin/python plot.py --out figures/confident --draw overview \
		"plain GRPO: mostly stuck=$(STUDY)confident.csv/grpo-plain" \
		"bonus, λ 0.01: escapes, drifts=$(STUDY)confident.csv/grpo-base-0.01" \
		"EPO, λ 0.01, α 3: stays=$(STUDY)confident.csv/grpo-epo3-0.01"
	$(VENV)/bin/python plot.py --out figures/keyquest "GRPO=$(STUDY)short.csv/grpo-plain" \
		"EPO, α 0.05, λ 0.01=$(STUDY)short.csv/grpo-epo0.05-0.01" \
		"EPO, α 0.05, λ 0.1=$(STUDY)short.csv/grpo-epo0.05-0.1" \
		"EPO, α 3, λ 0.1=$(STUDY)short.csv/grpo-epo3-0.1"
	$(VENV)/bin/python plot.py --out figures/scienceworld --draw overview \
		"GRPO=$(STUDY)scienceworld-long.csv/grpo-plain" \
		"EPO, α 0.05, λ 0.001=$(STUDY)scienceworld-long.csv/grpo-epo0.05-0.001" \
		"EPO, α 3, λ 0.02=$(STUDY)scienceworld-long.csv/grpo-epo3-0.02"
	$(VENV)/bin/python plot.py --out figures/smollm2-keyquest --draw overview \
		GRPO=results/smollm2/keyquest-plain GRPO+EPO=results/smollm2/keyquest-epo
	$(VENV)/bin/python -m tools.transcript --out figures/transcript.html \
		results/lr2e-3 results/lr2e-3-strong

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
