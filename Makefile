# `make demo` and `make test` do all the set-up themselves; `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
# locked: the pinned, hash-checked releases; latest: the newest that requirements/base.in admits
RELEASES ?= locked
PYTEST_ARGS ?=
TEST_JOBS ?= 2
TORTURE_ARGS ?=
# folders of tests whose coverage is measured, one after the other; others: the tests beside the folders
COVERED ?= $(sort $(patsubst tests/%/,%,$(wildcard tests/[a-z]*/))) others
CODE = $(shell find sge_det tests tools -name '*.py')

# The stamp's name holds a checksum of what the installation depends on: it is redone when that changes, and only then.
# The folder is part of it, as an editable installation names it.
STAMP := $(VENV)/.installed-$(shell (pwd; cat setup.py requirements/*) | cksum | cut -d ' ' -f 1)

.PHONY: help install demo test test-slow test-latest fuzz torture coverage lint bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10
	@echo
	@echo "PYTHON=$(PYTHON) makes the environment VENV=$(VENV); PYTEST_ARGS goes to pytest, TEST_JOBS=$(TEST_JOBS) at once."

install: $(STAMP)  ## set up $(VENV), if that has not been done

# made last, so that an interrupted installation leaves none
$(STAMP):
	@rm -f $(VENV)/.installed-*
	@sh requirements/install.sh '$(PYTHON)' '$(VENV)' '$(RELEASES)'
	@touch $@

demo: install  ## make sample data, train plain and SGE detectors on it with three seeds, print the gain
	$(VENV)/bin/python tools/make_sample_coco.py datasets/sge_sample
	$(VENV)/bin/python tools/measure_gain.py --config-file configs/sample/faster_rcnn_SGE_R_50_FPN.yaml \
		--output output/demo --seeds 0 1 2 --jobs 2 SOLVER.MAX_ITER 400

test: install  ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -m 'not slow' -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-slow: install  ## run more of the same kinds, which take longest
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests -m slow -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-latest:  ## run the tests on the newest releases of everything that is not pinned, in .venv-latest
	$(MAKE) test VENV=.venv-latest RELEASES=latest

fuzz: install  ## read thousands of damaged and hostile files of weights and annotations, and odd configs
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore tests/torture/fuzz_weights.py --mutated 2000 --crafted 500 --odd 500
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore tests/torture/fuzz_annotations.py --cases 2000
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore tests/torture/fuzz_configs.py --cases 1000

torture: install  ## end the tools at every operation on files, and follow their advice; goes on where it stopped
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore tests/torture/torture.py --jobs $(TEST_JOBS) \
		--results output/torture.jsonl $(TORTURE_ARGS)

# the tests of a room, or those beside the rooms; goes on where it stopped, and anew where the code has changed
output/coverage/%.data: $(CODE) | install
	@mkdir -p output/coverage
	COVERAGE_FILE=$@.part OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest \
		$(if $(filter others,$*),$(wildcard tests/test_*.py),tests/$*) -n $(TEST_JOBS) --dist loadfile --cov=sge_det \
		--cov-branch --cov-report= $(PYTEST_ARGS)
	@mv $@.part $@

coverage: $(COVERED:%=output/coverage/%.data)  ## run the tests room by room and print which part of each they run
	$(VENV)/bin/python -m coverage combine --keep --data-file=output/coverage/all $^
	$(VENV)/bin/python -m coverage json --data-file=output/coverage/all -o output/coverage.json
	$(VENV)/bin/python tests/rooms.py output/coverage.json

lint: install  ## check style and formatting
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

bench: install  ## time the layer
	$(VENV)/bin/python tools/benchmark.py layer --quick

clean:  ## remove the demo's files, build products and caches ($(VENV) stays)
	rm -rf output/demo datasets/sge_sample build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
