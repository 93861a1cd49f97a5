"""Faces in pictures: where they are, whose they are, and the key points that say how they are held.

Detection by a user's own InsightFace pack, alignment, embedding, key-point pictures. Not here: networks (`models`),
what is painted with a face (`pipelines`), the pack: its licence is for research only, so it neither ships nor is
fetched.
"""
