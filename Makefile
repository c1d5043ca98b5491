# make demo: set up and run the main job on a real chest CT (no PyTorch). make test: set up and pass the tests.
PYTHON ?= python3
# The version that the tests are known to pass with; an unpinned torch may fetch gigabytes of another build.
TORCH ?= torch==2.13.0
# A box of about twice the size of the nodule, R0,R1,A0,A1,S0,S1 in mm, as a person would draw it.
ROI = 8.3,35.6,105.2,134.8,-630,-595

# Or every child process of the tests would compile the sources again, and each worker every test.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint nnunet clean

demo: .venv-demo/ready
	.venv-demo/bin/unetseg sample --folder demo/sample
	.venv-demo/bin/unetseg segment demo/sample/lung1_image.nrrd --model lung-nodule-2d --roi=$(ROI) \
	  -o demo/lung1.seg.nrrd --picture demo/lung1.png --json demo/lung1.json --uncertainty demo/lung1-uncertainty.nrrd \
	  --reference demo/sample/lung1_label.nrrd

test: .venv/ready
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# For the test that runs nnU-Net's own check of a dataset on our export; without it that test skips. In a folder of its own and
# with what the check imports only: all that nnU-Net wants is half a gigabyte, and its torchvision another build than our torch.
NNUNET = nnunetv2==2.8.1 batchgenerators acvl-utils pandas scikit-image imageio lazy-loader tifffile nibabel blosc2 numexpr msgpack \
  ndindex httpx
nnunet: .venv/ready
	.venv/bin/pip install --quiet --upgrade --target build/nnunet --no-deps $(NNUNET)

# Asked before anything is made: an environment that another Python began stays that Python's, whatever PYTHON is next time.
# slicer-core has no wheels for 3.14.
python-to = @$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, $(1)) else "Python 3.10 to 3.$(1) is \
  needed and $(PYTHON) is %d.%d; name another, for instance with PYTHON=python3.12" % sys.version_info[:2])'

# build/lib: setuptools installs what lies there from an earlier time as well, such as a model that has been replaced.
.venv-demo/ready: pyproject.toml $(shell find UNetSegmentation training -name '*.py' -o -name '*.zip' -o -name '*.json')
	$(call python-to,14)
	$(PYTHON) -m venv .venv-demo
	rm -rf build/lib
	.venv-demo/bin/pip install --quiet ".[cli]"
	touch $@

# A step of its own, which CI does while `make demo` runs: it takes minutes, and needs nothing of this folder.
.venv/torch:
	$(call python-to,13)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet $(TORCH)
	touch $@

.venv/ready: .venv/torch pyproject.toml
	.venv/bin/pip install --quiet -e ".[test,train,mrml,panel,openvino]"
	touch $@

clean:
	rm -rf .venv .venv-demo demo build runs *.egg-info
