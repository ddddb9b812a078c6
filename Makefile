# The two commands: `make demo` and `make test`. Both build .venv from constraints.txt first.
# `make offline` packs fedqc with all it needs for a machine without internet (Linux, same Python and processor as here).
# TORCH_INDEX says where PyTorch comes from, also for the set-up: https://download.pytorch.org/whl/cpu has builds without CUDA,
# a tenth of the size, .../whl/cuNNN those for CUDA NN.N; by default pip's own index decides.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data/demo
PATIENTS ?= 340
STAMP := $(VENV)/.installed
OFFLINE := dist/offline
TORCH_INDEX ?=

export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1

.PHONY: setup demo test test-slow test-gpu check audit coverage bench offline clean-demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedqc needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(DATA): | $(STAMP)
	$(BIN)/fedqc data phantom $(DATA) --sites 4 --patients $(PATIENTS) --seed 7

demo: $(STAMP) $(DATA)
	@run=runs/demo-$$(date -u +%Y%m%dT%H%M%SZ); \
	$(BIN)/fedqc simulate configs/plans/demo.yaml --data $(DATA) --out $$run && \
	$(BIN)/fedqc report $$run

# The modules are spread over all cores (one module stays in one process) and run in a random order; to repeat an
# order: .venv/bin/python -m pytest --randomly-seed=N with the N that the first lines of the output name.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n auto -m "slow and not gpu"

# On a machine with an NVIDIA GPU: what no other machine can test.
test-gpu: $(STAMP)
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU that torch can use: fedqc site check says why")'
	$(BIN)/python -m pytest -m gpu

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/python tests/docstring_share.py
	$(BIN)/python -m server.public_model.rehearsals --check

# Looks up the pinned versions among the published advisories: exit status 1 where one has a known weakness, or cannot be looked
# up. Needs internet, and
# an environment of its own, so that nothing of it is part of fedqc. Without internet: a scanner that reads sbom.cdx.json.
AUDIT := .venv-audit
audit:
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
		$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

# Trains the public start on phantoms and on views of open real people; SOURCES = folders, one a scanner or collection,
# LABELS = a CSV (file, label) of slices that are not clean. Both sites stay in $(START) for benchmarks/real_start.py.
START ?= data/start
LABELS ?=
ARTIFACTS := metal beam_hardening motion susceptibility chemical_shift ct_motion
real-start: $(STAMP)
	$(BIN)/fedqc data inject $(SOURCES) $(START) --views 2000 --seed 616161 $(if $(LABELS),--labels $(LABELS)) \
		$(addprefix --artifact ,$(ARTIFACTS))
	$(BIN)/fedqc data phantom $(START)-phantoms --public --patients 1000 --seed 616162 --ct-motion
	mv $(START)-phantoms/public $(START)/ && rmdir $(START)-phantoms
	$(BIN)/fedqc simulate configs/plans/pretrain_real.yaml --data $(START) --out runs/real-start
	$(BIN)/python -m server.public_model.pretrain runs/real-start common/models/small_cnn_real.safetensors
	$(BIN)/python -m client.predict.make_severity $(START)/people

# Branch coverage of the quick suite, without the processes that it starts: `make check` prints what was measured last. No gate.
coverage: $(STAMP)
	$(BIN)/python -m pytest -n auto --cov --cov-branch --cov-report=
	$(BIN)/coverage json --quiet -o .coverage.json
	$(BIN)/python -c 'import json, subprocess; \
		totals = json.load(open(".coverage.json"))["totals"]; \
		share = 100 * totals["covered_branches"] / totals["num_branches"]; \
		commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(); \
		json.dump({"percent": share, "commit": commit}, open(".coverage-share.json", "w"))'
	$(BIN)/python tests/docstring_share.py

bench: $(STAMP)
	$(BIN)/python benchmarks/loop_overhead.py --quick --update docs/performance.md
	$(BIN)/python benchmarks/update_codecs.py --quick --update docs/performance.md
	$(BIN)/python benchmarks/noise.py --quick --update docs/performance.md
	$(BIN)/python benchmarks/free_gains.py --quick > /dev/null
	$(BIN)/python benchmarks/dp_step.py --quick --update docs/performance.md
	$(BIN)/python benchmarks/train_step.py --quick --update docs/performance.md
	$(BIN)/python benchmarks/deployment_round.py --quick --update docs/performance.md
	$(BIN)/python benchmarks/data_path.py --quick --update docs/performance.md
	@if $(BIN)/python -c 'import torchio, skimage' 2>/dev/null; then \
		$(BIN)/python benchmarks/simulators.py --quick --update docs/performance.md; \
	else echo "simulators: needs $(BIN)/python -m pip install -e '.[bench]'"; fi
	@if $(BIN)/python -c 'from importlib.util import find_spec; raise SystemExit(find_spec("mriqc_learn") is None)'; then \
		$(BIN)/python benchmarks/real_sites.py --quick > /dev/null; \
	else echo "real_sites: needs $(BIN)/python -m pip install -e '.[bench]'"; fi

offline: $(STAMP)
	rm -rf $(OFFLINE) build && mkdir -p $(OFFLINE)/wheels
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
		--wheel-dir $(OFFLINE)/wheels torch==2.13.0
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check -c constraints.txt --find-links $(OFFLINE)/wheels \
		--wheel-dir $(OFFLINE)/wheels .
	cp LICENSE docs/deploy.md $(OFFLINE)
	cd $(OFFLINE) && sha256sum wheels/*.whl | sed -E 's|^([0-9a-f]{64}) [ *](.*)$$|./\2 --hash=sha256:\1|' > requirements.txt
	$(BIN)/python docker/sbom.py $(OFFLINE)/wheels $(OFFLINE)
	cd $(OFFLINE) && sha256sum LICENSE deploy.md requirements.txt sbom.cdx.json LICENCES.csv wheels/*.whl > SHA256SUMS
	rm -rf build
	@echo "$(OFFLINE): $$(ls $(OFFLINE)/wheels | wc -l) wheels, $$(du -sh $(OFFLINE) | cut -f1). Tell the hospital, another way than the files:"
	@sha256sum $(OFFLINE)/SHA256SUMS
