# A training image: docker build -t stable-rlhf . && docker run --gpus all -v "$PWD/runs:/work/runs" stable-rlhf train
FROM python:3.11-slim

# The pinned versions that the tests ran with. torch from PyPI brings CUDA's libraries; the driver is the host's.
COPY constraints.txt pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[gguf,trackers,sentiment]"

# No root inside: a reward function is imported code.
RUN useradd --create-home trainer && mkdir -p /work/runs && chown -R trainer /work
USER trainer
WORKDIR /work
ENTRYPOINT ["stable-rlhf"]
CMD ["--help"]
