"""Training of `kinora-tiny`, in three commands (see `docs/tiny.md`):

python -m kinora.pipelines.tiny.train.autoencoder --out runs/vae --minutes 8
python -m kinora.pipelines.tiny.train.denoiser --autoencoder runs/vae --out runs/dit --minutes 15
python -m kinora.pipelines.tiny.train.export runs/dit --out pipelines/tiny/weights
"""
