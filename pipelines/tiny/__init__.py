"""The embedded model `kinora-tiny`: a stock diffusers `WanPipeline` trained by this repository."""
