"""Adapters: low-rank updates (LoRA) of the UNet, in the formats of PEFT and diffusers.

layers     layers with low-rank updates
targets    diffusers' layers as parts of ours, through the UNet's weight map
state      the adapters of a UNet: active, switched, fused
config     PEFT's LoraConfig, read
reading    folders, files, repositories and state dicts -> adapters
writing    adapters -> files
methods    the pipeline's methods
"""
