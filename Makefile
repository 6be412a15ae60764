# Each target works as the first command on a fresh machine: what it needs is installed into .venv.
PYTHON ?= python3
RUN = .venv/bin/python
EXECUTE = TQDM_DISABLE=1 $(RUN) -m jupyter nbconvert --to notebook --execute --ExecutePreprocessor.timeout=-1 \
	--ExecutePreprocessor.record_timing=False --CoalesceStreamsPreprocessor.enabled=True
DEMO = {"data": "sample", "epochs": 8, "batch_size": 50, "sizes": [16, 24], "corruption": 0, "teacher": null, \
	"folder": "demo"}

.PHONY: demo test lint train quick bench tables clean

demo: .venv/installed  ## execute the notebook on the sample of CIFAR-10 into demo/ (two minutes, no download)
	rm -rf demo
	mkdir demo
	S9_SETTINGS='$(DEMO)' $(EXECUTE) --output-dir demo S9.ipynb

test: .venv/installed  ## the whole suite, the notebook included, offline
	$(RUN) -m pytest --nbval S9.ipynb tests

lint: .venv/installed  ## ruff, with the rules in pyproject.toml
	$(RUN) -m ruff check .

train: .venv/installed  ## execute the notebook for real: refreshes its outputs, img/ and weights/
	@$(RUN) -c "from train import Recipe, announce; print(announce(Recipe()))"
	@echo "The notebook shows its outputs at the end. To see each epoch, stop this and start python train.py"
	$(EXECUTE) --inplace S9.ipynb

quick: .venv/installed  ## 85 % in a few minutes
	$(RUN) train.py --quick

bench: .venv/installed  ## measure both sides of every comparison of speed, on CIFAR-10: benchmarks/bench.json
	$(RUN) -m benchmarks.bench

tables: .venv/installed  ## the tables and charts in the Markdown files, from the committed files
	$(RUN) -m benchmarks.tables
	$(RUN) -m benchmarks.charts

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo
