# make demo [MR=path]   synthetic CT of a real torso MR, or of yours
# make test             the fast tests
# make package          the archive for the model zoo, verified on its own
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-slow bench package clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed
	$(PY) -m bundle demo $(if $(MR),--mr "$(MR)")

test: .venv/installed
	$(PY) -m pytest

test-slow: .venv/installed
	$(PY) -m pytest -m slow

# ratios and costs, minutes to an hour; DATA=DIR takes real pairs
bench: .venv/installed
	$(PY) benchmarks/training.py $(if $(DATA),--dataset_dir "$(DATA)")

# SCHEMA=FILE takes a copy of MONAI's metadata schema where there is no network
package: .venv/installed
	$(PY) -m bundle package $(if $(SCHEMA),--schema "$(SCHEMA)")

clean:
	rm -rf .venv demo dist eval runs
