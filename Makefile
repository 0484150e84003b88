# Two commands do all: `make demo` and `make test`. Both install what is missing first (see .ci/setup).
.PHONY: help setup demo test check libero clean
help:
	@echo "make demo    the whole loop on this machine's CPU, ending in runs/demo/report.html"
	@echo "make test    the tests that need no GPU and no minutes (the long ones: make test ARGS='-m slow')"
	@echo "make check   lint and types"
	@echo "make libero  LIBERO's packages beside the project's own, in .libero (1.5 GB)"
	@echo "make setup   install what is missing (the others do this by themselves)"

setup:
	@.ci/setup

demo: setup
	@.venv/bin/cotwin demo $(ARGS)

test:
	@.ci/setup test
	@.venv/bin/python -m pytest $(ARGS)

check: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/ty check

libero: setup
	@$$(command -v uv || echo .tools/uv/bin/uv) pip install --python .venv/bin/python --no-deps --target .libero -r sim/libero/requirements.txt

clean:
	rm -rf .venv .tools build *.egg-info
