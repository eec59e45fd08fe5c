"""Run folders on S3: a local folder that training writes to, and its copy in the bucket, which is the run."""
