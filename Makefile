# make demo [MR=path]   synthetic CT of a real torso MR, or of yours
# make test             the fast tests
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-slow bench clean

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

clean:
	rm -rf .venv demo eval runs
