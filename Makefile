PYTHON ?= python3
DEMO = --dataset demo --disent True --al 1.0 --be 0.1 --gam 0.00001 --weights none \
	--image-size 64 --batch-size 32 --embedding-size 64 --epochs 12 --lr 1e-3 --lr-decay-step 8 --warm 0 \
	--bn-freeze 0 --workers 2 --wandb disabled
DEMO_RUN = logs/logs_demo/bn_inception_Proxy_Anchor_embedding64_al1.0_be0.1_gam1e-05_adamw_lr0.001_batch32

.PHONY: help demo paper test test-gpu install

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */make \1\t/'

demo: install  ## draw a small data set, train on it for about two minutes, evaluate
	.venv/bin/python train.py $(DEMO) --overwrite
	.venv/bin/python evaluate.py --resume $(DEMO_RUN)/demo_bn_inception_last.pth
	@echo "One run this small cannot tell DDML from the plain loss: docs/evidence.md has what was measured."

paper: install  ## the three published commands, with and without DDML, three seeds: docs/reproduction.md's rows
	.venv/bin/python -m benchmarks.paper

test: install  ## the whole test suite: no network, no GPU, about five minutes on two cores
	CUDA_VISIBLE_DEVICES= .venv/bin/python -m pytest -n 2 --dist worksteal

test-gpu: install  ## the tests that need a GPU
	.venv/bin/python -m pytest -k cuda

install: .venv/installed  ## .venv with requirements.txt, which both of these do first

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@
