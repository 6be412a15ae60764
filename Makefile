# Each target works as the first command on a fresh machine: what it needs is installed into .venv.
PYTHON ?= python3
RUN = .venv/bin/python
EXECUTE = TQDM_DISABLE=1 $(RUN) -m jupyter nbconvert --to notebook --execute --ExecutePreprocessor.timeout=-1 \
	--ExecutePreprocessor.record_timing=False --CoalesceStreamsPreprocessor.enabled=True

.PHONY: demo test train bench clean

demo: .venv/installed  ## execute the notebook on built-in data into demo/ (a minute, no download)
	mkdir -p demo
	S9_SETTINGS='{"data": "built-in", "epochs": 4, "batch_size": 100, "folder": "demo", "teacher": null}' $(EXECUTE) --output-dir demo S9.ipynb

test: .venv/installed  ## the whole suite, the notebook included, offline
	$(RUN) -m pytest --nbval S9.ipynb tests

train: .venv/installed  ## execute the notebook for real: refreshes its outputs, img/ and weights/
	$(EXECUTE) --inplace S9.ipynb

bench: .venv/installed  ## measure both sides of every comparison of speed, on CIFAR-10: benchmarks/results.json
	$(RUN) benchmarks/bench.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo
