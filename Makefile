# Two commands matter: `make quickstart` runs the main job, `make test` passes the tests.
# Both install everything they need into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEACHER := models/smollm2-135m-instruct

.PHONY: install teacher quickstart dpkd-quickstart test check docs fix bench bench-loader soak clean

install: $(VENV)/installed

# torch first and alone: a resolver that meets "torch>=2.8" in another package's metadata
# would otherwise be free to choose the newest CUDA build. Composer is last and without its requirements, which
# ask for an older torch and for torchvision.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps mosaicml
	touch $@

teacher: install
	$(BIN)/python tools/fetch_teacher.py --out $(TEACHER)

quickstart: teacher
	$(BIN)/ddkmix train configs/quickstart.yaml run_dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

# Begins with the student of the last `make quickstart`.
dpkd-quickstart: teacher
	@student=$$(ls -td runs/quickstart-*/student 2>/dev/null | head -1); \
	test -n "$$student" || { echo "dpkd-quickstart begins with the student of make quickstart: run that first"; exit 2; }; \
	run=runs/dpkd-quickstart-$$(date +%Y%m%d-%H%M%S); set -ex; \
	$(BIN)/ddkmix generate configs/dpkd_quickstart.yaml student.model=$$student --by teacher; \
	$(BIN)/ddkmix train configs/dpkd_quickstart.yaml student.model=$$student run_dir=$$run; \
	$(BIN)/ddkmix rouge configs/dpkd_quickstart.yaml student.model=$$student; \
	$(BIN)/ddkmix rouge $$run

test: teacher
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quiet

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests/user_program.py

# The site of the public names, site/index.html.
docs: install
	$(BIN)/python tools/build_docs.py --out site

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: teacher
	$(BIN)/python tools/bench_step.py

# The peers are installed into an environment of their own, .cache/bench-loader/venv.
bench-loader: teacher
	$(BIN)/python tools/bench_loader.py --json .cache/bench-loader/results.json

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py --steps 200000

clean:
	rm -rf $(VENV) .cache runs site
