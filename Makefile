# The two commands of the README: `make demo` and `make test`. Both install what is missing first.
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
DEMO_RUN := demo/run-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo test test-slow lint install

demo: install demo/data
	$(PYTHON) train_dali.py --data demo/data --arch parallel_resnet18 --sizes 64 56 48 40 32 \
		--epochs 5 --batch-size 25 --lr 0.004 --warmup 1 --workers 2 --log-interval 10 \
		--wandb offline --output $(DEMO_RUN)

demo/data: | install
	$(PYTHON) -m pipelines.demo --output $@

test: install
	$(PYTHON) -m pytest

test-slow: install
	$(PYTHON) -m pytest -m slow

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml uv.lock install.sh
	./install.sh
	touch $@
