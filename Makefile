# Thin: what a target does is in the script it calls. Each does its own set-up first.
.PHONY: help demo test lint bench e2e image clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z0-9]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## show a mesh come up through real NATs; REGISTRY=kubernetes in a cluster, KEEP=1 leaves the lab standing
	@KEEP=$(KEEP) REGISTRY='$(REGISTRY)' hack/demo.sh

test: ## run every test, or a part: make test ARGS="tests/unit -k wire"
	@hack/test.sh $(ARGS)

lint: ## check style, types and import contracts
	@hack/lint.sh

bench: ## run the benchmarks, or one of them: make bench BENCH=name
	@hack/bench.sh $(BENCH)

e2e: ## try the built image and the chart on clusters that really run; KEEP=1, KUBECONFIGS=a,b, CLUSTERS=kind
	@KEEP=$(KEEP) KUBECONFIGS='$(KUBECONFIGS)' CLUSTERS='$(CLUSTERS)' OUTAGE='$(OUTAGE)' hack/e2e.sh

image: ## build the container images, try them, and write them to build/image
	@hack/image.sh

clean: ## remove what the others made in this tree
	@hack/clean.sh
