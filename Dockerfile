# The same image as `make image`, for those who have Docker. Both platforms:
# docker buildx build --platform linux/amd64,linux/arm64 .
FROM rust:1.95-bookworm AS build
WORKDIR /portpool
COPY . .
RUN target="$(uname -m)-unknown-linux-gnu" \
 && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target "$target" \
 && strip --strip-debug -o /usr/local/bin/portpool "target/$target/release/portpool"

FROM scratch
LABEL org.opencontainers.image.title=portpool \
      org.opencontainers.image.version=0.1.0 \
      org.opencontainers.image.licenses=Apache-2.0
COPY --from=build /usr/local/bin/portpool /usr/local/bin/portpool
ENV PATH=/usr/local/bin
USER 65532:65532
ENTRYPOINT ["portpool"]
