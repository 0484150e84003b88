#version 450
// Copies the forward pass; where nothing was drawn (alpha 0) the background is mid grey.

layout(set = 0, binding = 0) uniform sampler2D samplerColorRaw;

layout(location = 0) in vec2 inUV;

layout(location = 0) out vec4 outColor;

void main() {
  vec4 color = texture(samplerColorRaw, inUV);
  outColor = vec4(mix(vec3(0.5), color.rgb, color.a), 1);
}
