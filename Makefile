# Each target works as the first command on a fresh machine: what it needs is installed into .venv.
PYTHON ?= python3
PY = .venv/bin/python
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED = .venv/installed-$(VERSION)
EXPORT = .venv/installed-export-$(VERSION)
PIP = $(PY) -m pip install -q --disable-pip-version-check --root-user-action=ignore
DEMO = {"network": "NetDilated", "data": "sample", "validation_size": 0, "epochs": 8, "batch_size": 50, \
	"optimizer": "Muon", "max_lr": 0.3, "muon_lr_ratio": 0.1, "warmup": 0.25, "momentum": [0.85, 0.95], \
	"weight_decay": 0.0005, "augmentation": 0.5, "corruption": 0, "sizes": [16, 24], "teacher": null, \
	"corruption_types": ["gaussian_noise"], "wise_ft_alpha": null, "distillation_weight": 0.9, \
	"distillation_temperature": 4.0, "seed": 0, "num_workers": null, "device": "auto", "folder": "demo"}

.PHONY: install demo test lint train notebook publish quick bench tables export install-export test-export clean

install: $(INSTALLED)  ## what everything else needs, into .venv

demo: $(INSTALLED)  ## the notebook on the sample of CIFAR-10, in demo/: minutes, no download
	rm -rf demo
	S9_SETTINGS='$(DEMO)' TQDM_DISABLE=1 $(PY) tools/execute.py S9.ipynb demo/S9.ipynb

test: $(INSTALLED)  ## the whole suite, the notebook included, offline
	OMP_NUM_THREADS=1 $(PY) -m pytest --nbval -n 2 --dist loadscope --durations=20

lint: $(INSTALLED)  ## ruff, with the rules in pyproject.toml
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

train: $(INSTALLED)  ## the headline run, in runs/headline
	$(PY) train.py
	$(PY) evaluate.py runs/headline --save

notebook: $(INSTALLED)  ## execute the notebook as "Run all" does, on CIFAR-10, in place
	TQDM_DISABLE=1 $(PY) tools/execute.py S9.ipynb S9.ipynb

publish:  ## copy a finished run to weights/: make publish RUN=seed-1
	@test -n "$(RUN)" || { echo "which run? make publish RUN=seed-1"; exit 1; }
	@ls runs/$(RUN)/*.json > /dev/null 2>&1 || { echo "runs/$(RUN) has no finished run"; exit 1; }
	mkdir -p weights/$(RUN:headline=)
	cp runs/$(RUN)/*.pt runs/$(RUN)/*.json weights/$(RUN:headline=)
	if [ "$(RUN)" = headline ] && [ -d runs/headline/img ]; then cp runs/headline/img/*.png img/; fi

quick: $(INSTALLED)  ## 85 % in minutes
	$(PY) train.py --quick

bench: $(INSTALLED)  ## both sides of every comparison of speed, on CIFAR-10: benchmarks/bench.json
	$(PY) -m benchmarks.bench

tables: $(INSTALLED)  ## the tables and charts in the Markdown files, from the committed files
	$(PY) -m benchmarks.tables
	$(PY) -m benchmarks.charts

install-export: $(EXPORT)  ## what the export and its tests need, too

export: $(EXPORT)  ## the ONNX files, the page, and what they achieve on CIFAR-10
	$(PY) -m export
	$(PY) -m export.latency

test-export: $(EXPORT)  ## the tests of the ONNX files and of the page
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_export.py tests/test_page.py

$(EXPORT): requirements-export.txt $(INSTALLED)
	$(PIP) -r requirements-export.txt
	touch $@

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, \
	$(PYTHON) is %s: make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || { echo "$(PYTHON) has no ensurepip: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP) -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo
