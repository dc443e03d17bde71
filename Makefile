.DEFAULT_GOAL := help
.PHONY: help setup test test-grid lint quickstart reproduce-cifar reproduce-imagenet evidence evidence-status costs tables claims figures report \
  notebooks bench sync dashboard clean

PYTHON ?= python3
TRAIN ?= quick
SEEDS ?= 0
MODEL ?= resnet20
FLOPS ?= 0.667
RESULTS ?= results
REPRODUCED ?= reproduced
SOURCE ?= local
DEVICE ?= cpu
GPUS ?= 1
HOURS ?= 2.5
PROCESSES ?= 2
WORKERS ?= 2
SIZE ?= 224
CLASSES ?= 1000
IMAGENET_MODELS ?= resnet18 resnet50
IMAGENET_TRAIN ?= imagenet

RUN := .venv/bin/python
READY := .venv/.ready

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with everything pinned; does nothing if it is up to date

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"decef needs Python 3.11 to 3.13, not {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

test: setup ## Run the tests, on WORKERS=2 cores (a few minutes)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-grid: setup ## Train every dataset x architecture x layer type for two steps (4 minutes on 2 cores)
	$(RUN) -m pytest -m grid tests/test_grid.py tests/test_families.py tests/test_experiments.py tests/test_cli.py tests/test_training.py

lint: setup ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

quickstart: setup ## Train all layer types on the bundled digits and print their table, in reproduced/ (a few minutes)
	$(RUN) scripts/train.py -m experiment=quickstart results=$(REPRODUCED)
	$(RUN) scripts/tables.py --results $(REPRODUCED) --print digits-quickstart

reproduce-cifar: setup ## Train the layer types on CIFAR-10 from scratch, into reproduced/ (TRAIN=paper SEEDS=0,1,2 MODEL=resnet56 FLOPS=0.5)
	$(RUN) scripts/train.py -m experiment=cifar10 train=$(TRAIN) model=$(MODEL) layer.flops=$(FLOPS) seed=$(SEEDS) results=$(REPRODUCED)
	$(RUN) scripts/tables.py --results $(REPRODUCED) --print cifar10-$(TRAIN)

reproduce-imagenet: setup ## Train ResNet-18 and 50, dense and DeCEF, on ImageNet: DATA=folder with train/ and val/ (GPUS=8 SIZE=224 CLASSES=1000)
	@test -n "$(DATA)" || { echo "say where ImageNet is: make reproduce-imagenet DATA=FOLDER (with train/ and val/)"; exit 2; }
	for model in $(IMAGENET_MODELS); do for layer in conv2d decef; do \
	  $(RUN) -m torch.distributed.run --standalone --nproc_per_node=$(GPUS) scripts/train.py dataset=imagenet \
	    dataset.root=$(DATA) dataset.size=$(SIZE) dataset.num_classes=$(CLASSES) model=$$model layer=$$layer \
	    train=$(IMAGENET_TRAIN) results=$(REPRODUCED) || exit 1; done; done
	$(RUN) scripts/tables.py --results $(REPRODUCED) --print imagenet

evidence: setup ## Do the missing runs of configs/evidence.yaml, most valuable first, for HOURS=2.5 (PROCESSES=2 DEVICE=cuda)
	$(RUN) scripts/evidence.py run --hours $(HOURS) --processes $(PROCESSES) --device $(DEVICE) --results $(RESULTS)

evidence-status: setup ## Say which runs of configs/evidence.yaml are done, and how long the rest would take
	$(RUN) scripts/evidence.py status --processes $(PROCESSES) --device $(DEVICE) --results $(RESULTS)

costs: setup ## Count parameters and MACs of every architecture and layer type, into results/costs.md and docs/layers.md
	$(RUN) scripts/costs.py --out $(RESULTS)/costs $(if $(filter results,$(RESULTS)),--page docs/layers.md)

tables: setup ## Rebuild results/tables and the table in README.md from the run records (SOURCE=wandb: from W&B, into tables-wandb)
	$(RUN) scripts/tables.py --results $(RESULTS) --source $(SOURCE) $(if $(filter results-local,$(RESULTS)-$(SOURCE)),--readme README.md)

figures: setup ## Draw all figures from the run records and tables, into results/figures
	$(RUN) scripts/figures.py --results $(RESULTS)

notebooks: setup ## Check that all notebooks run from top to bottom (a minute)
	$(RUN) -m pytest notebooks

claims: setup ## Judge the papers' claims by the run records, and rebuild results/CLAIMS.md
	$(RUN) scripts/claims.py --results $(RESULTS)

report: setup ## Put claims, tables, charts and runs on one page for a browser, results/report.html
	$(RUN) scripts/report.py --results $(RESULTS)

bench: setup ## Time layers, operators, whole networks and training against Conv2d, into results/bench (DEVICE=cuda)
	$(RUN) scripts/bench.py --device $(DEVICE) --out $(RESULTS)/bench

sync: setup ## Upload the runs that W&B doesn't have yet
	$(RUN) scripts/sync.py --results $(RESULTS)

dashboard: setup ## Make or update a W&B workspace: accuracy against FLOPs, curves by layer type
	$(RUN) scripts/dashboard.py

clean: ## Remove the environment and caches; results stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis decef.egg-info
