# make demo [MR=path]   synthetic CT of an MR simulated from a real CT of a torso, beside that CT; or of your MR
# make test             the tests, about ten minutes on two cores
# make test-fast        those that neither start processes nor train nor sample, below one minute
# make test-slow        the longest ones
# make lint             ruff (lint and format) and mypy
# make package          the archive for the model zoo, verified on its own
# make label STUDIES=DIR  MONAI Label server on http://127.0.0.1:8000 (PORT=8000) for the images in DIR
# make dose             the environment of `wldm dose`: pyRadPlan and pymedphys
# make test-label       its tests; `make test` runs them too once the server's environment is there
PYTHON ?= python3
PY := .venv/bin/python
LABEL := .venv-label/bin/python
DOSE := .venv-dose/bin/python
PORT ?= 8000

.PHONY: demo test test-fast test-slow test-label lint label dose bench gpu package clean

.venv/installed: requirements.txt requirements-viewer.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	-$(PY) -m pip install --quiet --no-deps --requirement requirements-viewer.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	touch $@

demo: .venv/installed
	$(PY) -m bundle demo $(if $(MR),--mr "$(MR)")

# two processes of one thread each take about half the time of one with two: most tests are small. Modules stay whole, for
# they share what they have trained, and start in the order of tests/conftest.py, the longest first
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow and not integration"

test-slow: .venv/installed-dev
	$(PY) -m pytest -m slow

lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy benchmarks

.venv-label/installed: requirements-label.txt requirements-viewer.txt
	$(PYTHON) -m venv .venv-label
	$(LABEL) -m pip install --quiet --requirement requirements-label.txt
	$(LABEL) -m pip install --quiet --no-deps monailabel==0.8.5 pydicom-seg==0.4.1
	-$(LABEL) -m pip install --quiet --no-deps --requirement requirements-viewer.txt
	touch $@

label: $(if $(STUDIES),.venv-label/installed)
	@test -n "$(STUDIES)" || { echo "say which folder has the images: make label STUDIES=DIR"; exit 1; }
	@test -d "$(STUDIES)" || { echo "$(STUDIES): no such folder; correct STUDIES, or make it first"; exit 1; }
	$(LABEL) -m monailabel.main start_server --app bundle/label_app --studies "$(STUDIES)" --host 127.0.0.1 --port $(PORT)

.venv-dose/installed: requirements-dose.txt
	$(PYTHON) -m venv .venv-dose
	$(DOSE) -m pip install --quiet --requirement requirements-dose.txt
	$(DOSE) -m pip install --quiet --no-deps pyRadPlan==0.5.0 pymedphys==0.41.0
	touch $@

dose: .venv-dose/installed

test-label: .venv/installed-dev .venv-label/installed
	$(PY) -m pytest tests/test_label_app.py tests/test_slicer.py

# ratios and costs, minutes to an hour; DATA=DIR takes real pairs
bench: .venv/installed
	$(PY) -m pip install --quiet --no-deps ptwt==1.0.1
	$(PY) benchmarks/pipeline.py volumes
	$(PY) benchmarks/pipeline.py settings
	$(PY) benchmarks/files.py
	$(PY) benchmarks/blocks.py
	$(PY) benchmarks/resampling.py
	$(PY) benchmarks/wavelets.py
ifdef DATA
	$(PY) benchmarks/steps.py --dataset_dir "$(DATA)"
	$(PY) benchmarks/invariance.py --dataset_dir "$(DATA)"
endif
	$(PY) benchmarks/training.py $(if $(DATA),--dataset_dir "$(DATA)")

# trains and takes the GPU rows of the benchmarks within MINUTES, where no environment can be made; DATA is of `wldm pack`
gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) benchmarks/gpu.py --dataset_dir "$(DATA)" --output_dir "$(OUT)" --minutes $(or $(MINUTES),10) $(ARGS)

# SCHEMA=FILE takes a copy of MONAI's metadata schema where there is no network
package: .venv/installed
	$(PY) -m bundle package $(if $(SCHEMA),--schema "$(SCHEMA)")

clean:
	rm -rf .venv .venv-label .venv-dose demo dist eval runs
