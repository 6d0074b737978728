# The commands of the README: `make demo`, `make demo-ffcv` and `make test`. All install what is missing.
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
DEMO_RUN := demo/run-$(shell date +%Y%m%d-%H%M%S)
DEMO_OPTIONS := --arch parallel_resnet18 --sizes 64 56 48 40 32 --epochs 5 --batch-size 25 --lr 0.004 \
	--warmup 1 --workers 2 --log-interval 10 --wandb offline --output $(DEMO_RUN)

# Tests start a hundred processes, each of which would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-ffcv test test-slow test-faults test-oldest lint docs mutations install

demo: install demo/data
	$(PYTHON) train_dali.py --data demo/data $(DEMO_OPTIONS)

demo-ffcv: install demo/data
	$(PYTHON) -m pipelines.beton --data demo/data --output demo/beton
	$(PYTHON) train_ffcv.py --data demo/beton $(DEMO_OPTIONS)

demo/data: | install
	$(PYTHON) -m pipelines.demo --output $@

# Each has a part of the files, and who is ready first takes from the end of another's. Three processes on two
# cores, as tests wait for a sixth of their time.
test: install
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 3 --dist worksteal

test-slow: install
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow -n 2 --dist worksteal

test-faults: install
	$(PYTHON) -m pytest -m faults

# With the oldest torch and torchvision that are promised.
test-oldest: install
	scripts/test_oldest.sh

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/zensical build --strict --clean

# A page or anchor that a link names and that is not there is an error.
docs: install
	$(PYTHON) scripts/options_page.py
	.venv/bin/zensical build --strict --clean

# Breaks the code in sixteen places, one at a time, and looks whether the tests notice.
mutations: install
	$(PYTHON) tests/mutations.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml uv.lock install.sh
	./install.sh
	touch $@
