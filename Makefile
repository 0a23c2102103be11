# The same words for a newcomer, a developer and CI. Every target sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(PYTHON) scripts/install.py

.PHONY: demo up test test-clients test-openapi check format bench bench-full lock install

demo:            ## set up, start the service, train a model, show the result
	@$(INSTALL) local
	@$(BIN)/satune demo --up

up:              ## set up and start the service: ARGS="--port 8080"
	@$(INSTALL) local
	@$(BIN)/satune up $(ARGS)

test:            ## set up and run all tests, two files at a time: ARGS="tests/jobs -k lease"
	@$(INSTALL) dev clients
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-clients:    ## every version of OpenAI's client that is promised to work, one by one, against a real service
	@$(INSTALL) dev clients
	@$(BIN)/python -m pytest -v -rs tests/clients $(ARGS)

test-openapi:    ## call every operation as its description says, and as it does not, thousands of times: CASES=50
	@$(INSTALL) dev
	@CASES=$(or $(CASES),50) $(BIN)/python -m pytest -s tests/openapi $(ARGS)

check:           ## formatting, lint, types, import directions
	@$(INSTALL) dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format:          ## rewrite the sources as `check` wants them
	@$(INSTALL) dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench:           ## measure speed and quality, shortened; one table of figures and bars
	@$(INSTALL) dev
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-full:      ## all of it, for hours; resumable
	@$(INSTALL) dev
	$(BIN)/python benchmarks/bench.py --full $(ARGS)

install:         ## set up for development and do nothing else
	@$(INSTALL) dev clients

# Needs uv. Hashes but no addresses, so that the locks hold wherever packages come from. The development lock comes
# before the others and binds them, so that changing between `make demo` and `make test` changes no version. What only
# CUDA needs stays in the lock of torch alone.
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command "make lock"
CUDA_ONLY := sed -nE 's/^((nvidia-|cuda-|triton)[a-z0-9-]*)(\[.*\])?==.*/--no-emit-package \1/p' requirements/torch-cuda.lock
lock:            ## resolve all dependencies anew
	$(COMPILE) --upgrade requirements/constraints.txt -o requirements/torch-cuda.lock
	$(COMPILE) --upgrade -c requirements/constraints.txt --no-emit-package torch $$($(CUDA_ONLY)) \
	  --extra dev pyproject.toml -o requirements/dev.lock
	for extra in api worker local; do \
	  $(COMPILE) -c requirements/constraints.txt -c requirements/dev.lock --no-emit-package torch \
	    --extra $$extra pyproject.toml -o requirements/$$extra.lock || exit 1; \
	done
	for version in 1.109.1 2.54.0; do \
	  echo openai==$$version | $(COMPILE) - -o requirements/clients/openai-$$version.lock || exit 1; \
	done
	cd tests/clients && npm install --package-lock-only --omit-lockfile-registry-resolved --save-exact openai@latest
