# make help lists the targets. PYTHON=python uses the active environment instead of .venv,
# PYTHON3=python3.12 chooses the Python that .venv is made with.
PYTHON3 ?= python3
PROFILE ?= offline
PRETRAIN_ARMS ?= vits16_cifar10
# What test-quick tests: the method, as data flows, and how its results are kept and decided.
METHOD = heads neighbors metrics features cache baselines rivals icbpl maps claims ledger against_paper
VENV := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)/python
VENV_STAMP :=
ifndef PYTHON
PYTHON := $(VENV)
VENV_STAMP := .venv/.complete
endif

.DEFAULT_GOAL := help
.PHONY: help setup setup-cpu reproduce paper-mini paper-vectors pretrain-paper test test-quick notebooks refresh figures student api links rehearse score hero slides site dist bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.complete: requirements.lock
	@$(PYTHON3) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python 3.11 to 3.13 is needed and this is %d.%d; name another one, for example make setup PYTHON3=python3.12." % v)'
	@echo "Installing into .venv (once; 6.5 GB on disk, a few minutes)"
	@$(PYTHON3) -m venv .venv
	@$(VENV) -m pip install -q --disable-pip-version-check -r requirements.lock
	@$(VENV) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup: $(VENV_STAMP)  ## create .venv from requirements.lock (once; skipped when it is there)

setup-cpu:  ## the same without CUDA, 1.5 GB and not 6.5: needs uv and a network
	@uv venv --allow-existing .venv
	@uv pip install --torch-backend cpu -e '.[study,photos,dev]'
	@touch .venv/.complete

reproduce: $(VENV_STAMP)  ## run every notebook: PROFILE=offline|small|paper, SET="key=value ...", FORCE=1, JOBS=1
	@$(PYTHON) -m tsp_utils reproduce --profile "$(PROFILE)" $(if $(SET),--set $(SET)) $(if $(FORCE),--force) $(if $(JOBS),--jobs $(JOBS))

test: $(VENV_STAMP)  ## lint, types, unit tests, and nbval over the committed notebooks (08 reads the others' evidence)
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_devices.py
	@$(PYTHON) -m pytest tests/test_devices.py
	@$(PYTHON) -m pytest notebooks --nbval-lax --nbval-cell-timeout=1800 --ignore-glob='*/08_*' -n 2 --dist loadfile
	@$(PYTHON) -m pytest notebooks/08_* --nbval-lax --nbval-cell-timeout=1800

test-quick: $(VENV_STAMP)  ## lint and the tests of the method alone: no notebook, no rehearsal
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m pytest $(addprefix tests/test_,$(addsuffix .py,$(METHOD))) -n 2 --dist load

notebooks: $(VENV_STAMP)  ## open the notebooks in JupyterLab
	@$(PYTHON) -m jupyterlab notebooks

refresh: reproduce  ## run the notebooks and put their outputs into notebooks/
	@$(PYTHON) -m tsp_utils refresh

figures: $(VENV_STAMP)  ## copy the figures and tables of a finished run into figures/
	@$(PYTHON) -m tsp_utils figures --profile $(PROFILE)

paper-mini: $(VENV_STAMP)  ## the paper's central row by stages: downloads 255 MB, an hour or two on a CPU
	@$(PYTHON) -m tsp_utils paper-mini $(if $(SET),--set $(SET)) $(if $(GO_ON),--go-on)

paper-vectors: $(VENV_STAMP)  ## its vectors as a file to send or to keep (7.7 MB); TRAIN=1: the 50,000 as well
	@$(PYTHON) -m experiments paper-vectors $(if $(TRAIN),--train)

pretrain-paper: $(VENV_STAMP)  ## pretrain the 224-px arms that the paper's Figs 4b, 6 and 7a need (one GPU)
	@for arm in $(PRETRAIN_ARMS); do $(PYTHON) -m experiments pretrain $$arm || exit 1; done

student: $(VENV_STAMP)  ## make the students' copies in student/: no outputs, stubs for solutions, boxes for predictions
	@$(PYTHON) docs/make_student.py

api: $(VENV_STAMP)  ## write docs/api.md from the docstrings
	@$(PYTHON) docs/make_api.py

links: $(VENV_STAMP)  ## write the repository's address, from pyproject.toml, wherever it stands
	@$(PYTHON) docs/links.py

rehearse: $(VENV_STAMP)  ## the lesson of docs/teaching.md, timed block by block: CACHED=1 for the caches that are there
	@$(PYTHON) docs/rehearse.py $(if $(CACHED),--cached)

score: $(VENV_STAMP)  ## a loss of your own among those of notebook 10: LOSS=my_loss.py (a minute)
	@$(PYTHON) -m docs.score_loss "$(LOSS)"

hero: $(VENV_STAMP)  ## draw the README's picture and its film
	@$(PYTHON) -m docs.hero

slides: $(VENV_STAMP)  ## the lesson's twenty slides with notes, one file, site/slides.html: needs pip install -e .[site]
	@$(PYTHON) -c 'import latex2mathml' 2>/dev/null || { echo 'error: the slides need a package that is not here; install it once: $(PYTHON) -m pip install -e ".[site]"'; exit 1; }
	@$(PYTHON) docs/make_slides.py

site: $(VENV_STAMP)  ## all pages and notebooks as HTML in site/, read without a network: needs pip install -e .[site]
	@$(PYTHON) -c 'import furo, latex2mathml, myst_nb, sphinx_external_toc' 2>/dev/null || { echo 'error: the site is made by packages that are not here; install them once: $(PYTHON) -m pip install -e ".[site]"'; exit 1; }
	@rm -rf build/site
	@$(PYTHON) -m sphinx -q -c docs . build/site/html
	@rm -rf site build/site/html/.doctrees && mv build/site/html site && rm -rf build/site
	@$(PYTHON) docs/make_slides.py
	@echo "Open site/index.html"

dist: $(VENV_STAMP)  ## the sdist, and the wheel made from it, in dist/, checked: needs pip install build twine
	@$(PYTHON) -m build
	@$(PYTHON) -m twine check --strict dist/*

bench: $(VENV_STAMP)  ## measure speed and memory, print the table of docs/speed.md
	@$(PYTHON) -m benchmarks.bench

clean:  ## remove caches, executed notebooks and the site (data/, .venv, pretrained arms and paper-mini's record stay)
	rm -rf cache site
	@if [ -d runs ]; then find runs -mindepth 1 -maxdepth 1 ! -name pretrain ! -name 'paper-mini*' -exec rm -rf {} +; fi
