"""The networks that judge images. rewards.py loads them by name.

  clip.py          HPSv2.1, PickScore and CLIPScore, the toy world's, and the aesthetic predictor
  imagereward.py   ImageReward
  mps.py           the Multi-dimensional Preference Score
  detector.py      DiffDoctor's artifact detector
  weights.py       reads their files: every weight must come from them, and no code is run
  images.py        resizes and normalizes what they see

To add one, write a class like those in clip.py, and in rewards.py give it a row in REWARDS and a
branch in build_reward; for evaluate.py, name it in QUALITY there. A judge is called with images
(B, 3, H, W) in [0, 1] and B prompts, and returns scores (B,). It is frozen and differentiable. The
detector has no prompts and returns a map for each image.
"""
