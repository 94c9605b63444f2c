# Every target makes what it needs; `make help` lists them. `PYTHON=/path/to/python3.11` picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait must not spin: on a busy machine a spinning pair is many times slower.
export OMP_WAIT_POLICY ?= passive
RELEASE := artifacts/releases/current
RAY := .tools/ray
# What `make build-engines` builds from: a folder with captioner/ and ranker/, by default the demo's.
RUN ?= artifacts/demo/synthetic
LANE ?= cpu
# What PLAN=1 shows where nothing else is named: LLaVA-1.5-7B's shape on one large and on two small GPUs.
PLANNED_GPUS := h200$(if $(filter trtllm,$(LANE)), 2xa10)
SHAPE := llava-1.5-7b

.DEFAULT_GOAL := help
.PHONY: help setup demo test ray test-ray lint doctor build-engines serve evaluate quality bench bench-store bench-hot bench-merge bench-backfill soak chaos clean

help:           ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:          ## Make .venv from requirements.lock and fetch perf_analyzer; at once when up to date
	@$(PYTHON) tools/setup.py

demo: setup     ## Generate data, train, build, serve and rank; DATA=dir: on a data set in the MovieLens layout
	@$(BIN)/sightline demo $(if $(DATA),--data "$(DATA)")

test: setup     ## Run all tests (unit, contract, end to end); T="-k name" passes options to pytest
	@$(BIN)/python -m pytest -q $(T)

ray: $(RAY)/ready  ## Make .tools/ray: .venv and Ray Data, for `.tools/ray/bin/python -m sightline.cli … --ray`

test-ray: ray   ## Run the tests that need Ray
	@$(RAY)/bin/python -m pytest -q tests/end_to_end/test_ray.py tests/end_to_end/test_backfill_ray.py $(T)

lint: setup     ## ruff on everything, strict typing on sightline/ and client/
	@$(BIN)/ruff check .
	@$(BIN)/mypy sightline client/sightline_client

build-engines: setup  ## Publish a release; LANE=cpu|trtllm|llmapi GPU=h200 CHECKPOINT=dir BUILD="--quant fp8 …"; PLAN=1 only shows
ifeq ($(PLAN),)
	@$(BIN)/sightline build run --lane $(LANE) --checkpoint $(or $(CHECKPOINT),$(RUN)/captioner) --ranker $(RUN)/ranker \
	  $(if $(GPU),--gpu $(GPU)) $(BUILD)
else
	@for gpu in $(or $(GPU),$(PLANNED_GPUS)); do \
	  $(BIN)/sightline build plan --lane $(LANE) --checkpoint $(or $(CHECKPOINT),$(SHAPE)) --gpu $$gpu $(BUILD) || exit; done
endif

doctor: setup   ## Check what this machine can do and how to mend the rest; TARGET=gpu for a GPU node
	@$(BIN)/sightline doctor $(if $(TARGET),--target $(TARGET))

serve: setup $(if $(filter gpu,$(TARGET)),,$(RELEASE))  ## Serve the current release through Triton; TARGET=gpu: in the container, PRINT=1 only shows how
	@$(BIN)/sightline serve $(if $(TARGET),--target $(TARGET)) $(if $(PRINT),--print)

evaluate: setup ## What content brings a ranker: DATA=dir (MovieLens or Sightline layout), SPLIT=cold|temporal|warm
	@$(BIN)/sightline evaluate --data $(or $(DATA),artifacts/data/synthetic) --split $(or $(SPLIT),cold) $(EVALUATE)

quality: setup  ## Run the demo's job afresh and hold it to evaluation/gates.json
	@$(BIN)/sightline quality

bench: setup $(RELEASE)  ## Measure every model and the ensemble with perf_analyzer; report under artifacts/bench
	@$(BIN)/sightline bench

bench-store: setup  ## Measure the feature store's reads beside bare LMDB and Redis; BENCH="--runs 50" passes options
	@$(BIN)/python -m benchmarks.store $(BENCH)

bench-hot: setup  ## Measure rank_items beside FastAPI, LitServe, BentoML and Ray Serve (20 minutes); BENCH="--quick" passes options
	@$(BIN)/python -m benchmarks.hot $(BENCH)

bench-merge: setup  ## Measure merged search of two gallery versions beside FAISS, hnswlib, Milvus Lite; BENCH="--items 1000000"
	@$(BIN)/python -m benchmarks.merge $(BENCH)

bench-backfill: setup  ## Compare methods of backfilling by retrieval quality; DATA=dir of classes BENCH="--set cifar100 …"
	@$(BIN)/python -m benchmarks.backfill $(if $(DATA),--data "$(DATA)") $(BENCH)

soak: setup     ## Ten minutes of rank_items at 70 % of capacity while the store changes; BENCH="--minutes 60" passes options
	@$(BIN)/python -m benchmarks.soak $(BENCH)

chaos: setup    ## Kill every part under load: what clients see, how long it lasts; BENCH="--faults redis" passes options
	@$(BIN)/python -m benchmarks.chaos $(BENCH)

clean:          ## Remove environment, tools and caches; artifacts/ (data, models, reports) stays
	rm -rf .venv .tools .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Sees what .venv has, editable installs included, and adds the pins that requirements.lock does not have.
$(RAY)/ready: deploy/requirements-ray.lock requirements.lock | setup
	@$(BIN)/python -m venv --clear --without-pip $(RAY)
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > $(RAY)/lib/python3.11/site-packages/venv.pth
	@$(RAY)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r deploy/requirements-ray.lock
	@$(RAY)/bin/python tools/closure.py deploy/requirements-ray.lock
	@touch $@

$(RELEASE): | setup
	@echo "There is no release yet: the demo trains and builds one (about 12 minutes)."
	@$(MAKE) --no-print-directory demo
