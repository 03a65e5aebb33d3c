# make demo | test | bench | venv      (PYTHON=python3.12 chooses the interpreter, 3.10 to 3.13)
PYTHON ?= python3
IMAGE ?= assets/demo.jpg
PROMPT ?= A woman at a window by the sea turns to the camera and says: "Listen, the tide is coming in." The audio shows her calm voice, wind and distant waves.
RUN := .venv/bin/python
DEMO := demo

.PHONY: venv demo test bench bench-gpu lint

venv: .venv/ready

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip freeze | grep -iE '^(torch|torchaudio|torchvision|numpy)==' > .venv/before
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip freeze | grep -iE '^(torch|torchaudio|torchvision|numpy)==' > .venv/after
	diff .venv/before .venv/after || { echo "requirements.txt replaced torch or numpy, which belong to the user"; exit 1; }
	touch $@

# A clip from a picture and a prompt through the shipped workflow, on a random model: noise, but real files end to end.
demo: venv
	$(RUN) -m mova demo-model $(DEMO)/models/mova/demo
	mkdir -p $(DEMO)/input $(DEMO)/output
	cp "$(IMAGE)" $(DEMO)/input/
	$(RUN) -m headless run workflows/mova_image_to_video_audio.json --models $(DEMO)/models --input $(DEMO)/input --output $(DEMO)/output --model demo \
		--set LoadImage.image="$(notdir $(IMAGE))" --set MOVAEncodeText.prompt='$(subst ','\'',$(PROMPT))' \
		--set MOVAImageToVideoAudio.size=custom --set MOVAImageToVideoAudio.width=128 --set MOVAImageToVideoAudio.height=96 \
		--set MOVAImageToVideoAudio.length=25 --set MOVADenoise.steps=8

# A worker for each core, four at most, computing in one thread each: files of tests run side by side.
test: venv
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: venv
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

bench: venv
	$(RUN) -m bench

# On an NVIDIA GPU; half an hour and 40 GB of temporary disk. Results are kept in bench/results/.
bench-gpu: venv
	$(RUN) -m bench.gpu
